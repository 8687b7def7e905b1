"""Spoken commands in many voices, made by espeak-ng, and the recipe that learns them:

    apt-get install espeak-ng && pip install 'modelworks[nets]'
    python recipes/spoken_words.py words
    modelworks run words/spoken-words.toml

espeak-ng is a program of its own (GPL-3), which is asked for each sound. spoken-words.zip holds words.csv with the columns
file, word and voice beside the sounds. The folds are by voice: each is tested on voices that it has not heard.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
# accents and kinds of voices; no two alike
VOICES = (
    "en-us+m1", "en-us+f1", "en-us+m2", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m5", "en-us+f5", "en-us+m8", "en-us+f3",
    "en-gb-x-rp+m4", "en-gb-x-rp+f3", "en-gb-x-rp+m7", "en-gb-x-rp+f2", "en-gb-scotland+m5", "en-gb-scotland+f5",
    "en-gb-x-gbclan+m6", "en-gb-x-gbclan+f1", "en-029+m7", "en-029+f4",
)  # fmt: skip
WAYS = [(speed, pitch) for speed in (125, 155, 190) for pitch in (35, 65)]  # words a minute, of 0 to 99
RECIPE = """# Which command is it, in a voice that was never heard? Made by recipes/spoken_words.py.
name = "spoken-words"
description = "Ten spoken commands in twenty voices of espeak-ng, by a convolutional net on mel spectrograms."
seed = 0

[data]
name = "spoken-words"
source = "spoken-words.zip"

[train]
target = "word"
algorithm = "cnn"
transforms = [
    { op = "resample", rate = 16000, seconds = 0.8 },
    { op = "mel-spectrogram", bands = 32, hop = 240, low = 80 },
    { op = "normalise", columns = "audio" },
    { op = "augment", columns = "audio", shift = 0.12, noise = 0.4 },
]
metrics = ["accuracy", "log_loss"]
alias = "champion"

[train.hyperparameters]
channels = [16, 32, 64]
epochs = 12
learning_rate = 0.004
schedule = "one-cycle"
dropout = 0.4
label_smoothing = 0.05

[train.validation]
kfold = 5
group = "voice"

[[train.gates]]
metric = "accuracy"
at_least = 0.85

[deploy]
"""


def spoken(word: str, voice: str, speed: int, pitch: int) -> bytes:
    """A WAV file."""
    command = ["espeak-ng", "-z", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    # to a pipe it cannot write the length, so the header has a wrong one
    size = len(data)
    return data[:4] + (size - 8).to_bytes(4, "little") + data[8:40] + (size - 44).to_bytes(4, "little") + data[44:]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    if shutil.which("espeak-ng") is None:
        print("this needs the program espeak-ng; on Debian or Ubuntu run: apt-get install espeak-ng")
        return 1
    asked = [(word, voice, *way) for word in WORDS for voice in VOICES for way in WAYS]
    with ThreadPoolExecutor(4) as pool:
        sounds = list(pool.map(lambda one: spoken(*one), asked))
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spoken-words.toml").write_text(RECIPE)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file", "word", "voice"])
    with zipfile.ZipFile(folder / "spoken-words.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for (word, voice, speed, pitch), sound in zip(asked, sounds, strict=True):
            name = f"{voice}/{word}-{speed}-{pitch}.wav"
            archive.writestr(name, sound)
            rows.writerow([name, word, voice])
        archive.writestr("words.csv", table.getvalue())
    print(f"{folder}: {len(asked)} sounds of {len(WORDS)} words in {len(VOICES)} voices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
