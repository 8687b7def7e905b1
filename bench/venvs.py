"""The peers' environments, one each under bench/.venvs, made when they are first needed; versions are pinned.

    python -m bench.venvs            make them all and say what could not be installed
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"
MODEL = ["onnxruntime==1.32.0"]  # with the numpy that the peer takes
PEERS = {
    "litserve": ["litserve==0.2.19", "numpy==2.4.6", *MODEL],
    "mosec": ["mosec==0.9.8", "numpy==2.4.6", *MODEL],
    "pytriton": ["nvidia-pytriton==0.7.0", "numpy==1.26.4", *MODEL],
}


def python(name: str) -> Path | None:
    """The peer's interpreter; None, with the reason on stderr, where it cannot be installed on this machine."""
    folder = FOLDER / name
    mark = folder / ".installed"
    wanted = "\n".join(PEERS[name])
    found = folder / "bin" / "python"
    if mark.exists() and mark.read_text() == wanted:
        return found
    print(f"installing {name} into {folder} ...", file=sys.stderr)
    if not found.exists():
        venv.create(folder, with_pip=True)
    command = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS[name]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
        print(f"{name} cannot be installed here: {lines[-1][:200]}", file=sys.stderr)
        return None
    mark.write_text(wanted)
    return found


def main() -> None:
    for name in PEERS:
        print(f"{name}: {python(name) or 'not installed'}")


if __name__ == "__main__":
    main()
