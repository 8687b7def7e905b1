"""Archives of images, sounds and texts become tables; what is hostile or broken is refused within bounds and named."""

from __future__ import annotations

import base64
import io
import stat
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput, ModelworksError, UnsupportedMedia
from modelworks.core.specs import TableSchema
from modelworks.ml.data.ingest import ingest
from modelworks.ml.data.profile import profile
from tests.media import digits, picture, tarred, tone, zipped
from tests.threats.hostile_files import million

DOT = picture(np.full((4, 6), 7, np.uint8))
RED = picture(np.full((5, 5, 3), [200, 0, 0], np.uint8), "JPEG")


@pytest.fixture
def load(tmp_path):
    def run(content: bytes, name: str = "data.zip", **schema):
        path, out = tmp_path / "upload", tmp_path / "out.parquet"
        path.write_bytes(content)
        result = ingest(path, filename=name, schema=TableSchema(**schema), out=out)
        return result, pq.read_table(out), profile(out, result.columns)

    return run


def test_a_folder_a_class_is_the_same_in_every_archive(load):
    files = digits(40)
    found, table, _ = load(zipped(files))
    assert [(column.name, column.type) for column in found.columns] == [("image", "image"), ("label", "category")]
    assert table["image"].to_pylist() == list(files.values())
    assert table["label"].to_pylist() == [name.split("/")[1] for name in files]
    backwards = dict(reversed(files.items()))
    for other in (tarred(backwards), tarred(backwards, "w"), zipped({k.removeprefix("digits/"): v for k, v in files.items()})):
        assert load(other)[0].digest == found.digest
    assert load(zipped(files | {"digits/0/one more.png": DOT}))[0].digest != found.digest


def test_sounds_and_texts_and_what_a_profile_says_of_files(load):
    sounds = {"yes/a.wav": tone(440), "no/b.flac": tone(880, rate=8000, format="FLAC"), "no/c.mp3": tone(880, 1, format="MP3")}
    found, _, (told, warnings) = load(zipped(sounds | {"no/same.wav": tone(440)}))
    assert [(column.name, column.type) for column in found.columns] == [("audio", "audio"), ("label", "category")]
    about = told["columns"][0]
    assert about["seconds"]["min"] == pytest.approx(0.5, abs=0.01)
    assert about["rates"] == {"16000": 3, "8000": 1}
    assert about["duplicates"] == 1
    assert "1 files repeat earlier ones" in warnings[0]
    found, table, _ = load(zipped({"good/1.txt": "fein ü".encode(), "bad/2.txt": b"poor"}))
    assert [column.type for column in found.columns] == ["text", "category"]
    assert table["text"].to_pylist() == ["poor", "fein ü"]
    _, table, (told, _) = load(zipped({"train/a/1.png": DOT, "test/b/2.jpg": RED}))
    assert table["split"].to_pylist() == ["test", "train"]
    assert told["columns"][0]["modes"] == {"L": 1, "RGB": 1}
    assert told["columns"][0]["width"] == {"min": 5, "median": 5.5, "max": 6}


def test_a_table_in_the_archive_names_its_files(load):
    rows = "file_name,age,label\nb.png,3,old\na.png,1,young\n"
    found, table, _ = load(zipped({"faces/meta.csv": rows.encode(), "faces/a.png": DOT, "faces/b.png": RED}))
    assert [(column.name, column.type) for column in found.columns] == [
        ("image", "image"),
        ("age", "integer"),
        ("label", "category"),
    ]
    assert table["image"].to_pylist() == [RED, DOT]
    lines = b'{"file": "img/a.png", "text": "one"}\n{"file": "img/none.png", "text": "two"}\n'
    with pytest.raises(InvalidInput, match=r"row 2 \(line 2\), column 'file': the archive has no file 'img/none.png'"):
        load(zipped({"list.jsonl": lines, "img/a.png": DOT}))


def test_files_in_parquet_and_in_base64(load, tmp_path):
    inside = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([{"bytes": DOT, "path": "x"}, {"bytes": RED, "path": None}]), "y": [1, 2]}), inside)
    found, table, _ = load(inside.getvalue(), "train.parquet")
    assert found.columns[0].type == "image"
    assert table["image"].to_pylist() == [DOT, RED]
    line = b'{"picture": "%s", "y": 1}\n' % base64.b64encode(DOT)
    found, table, _ = load(line, "x.jsonl", columns={"picture": "image"})
    assert table["picture"].to_pylist() == [DOT]
    with pytest.raises(InvalidInput, match="no object store") as caught:
        load(b"image,y\ns3://bucket/a.png,1\n", "x.csv", columns={"image": "image"})
    assert caught.value.code == "no_object_store"


def test_plain_text_is_lines(load):
    prose = b"The first of the lines, short.\n\nThe second one; with more words, and commas, two.\n"
    found, table, _ = load(prose, "book.txt")
    assert [(column.name, column.type) for column in found.columns] == [("text", "text")]
    assert len(table) == 2
    assert [c.name for c in load(b"a,b\n1,2\n3,4\n", "table.txt")[0].columns] == ["a", "b"]


def test_corrupt_files_are_named_or_left_out(load):
    files = {f"a/{i}.png": picture(np.full((4, 4), i, np.uint8)) for i in range(3)} | {"b/cut.png": DOT[:50], "b/fine.png": DOT}
    with pytest.raises(InvalidInput, match=r"the file 'b/cut\.png' is a broken image") as caught:
        load(zipped(files))
    assert (caught.value.code, caught.value.detail["file"]) == ("bad_media", "b/cut.png")
    found, table, _ = load(zipped(files), on_corrupt="skip")
    assert len(table) == 4
    assert "1 file could not be decoded" in found.notes[0]
    assert "b/cut.png" in found.notes[0]
    with pytest.raises(InvalidInput, match="none of the 1 files can be decoded"):
        load(zipped({"a/x.png": b"nothing"}), on_corrupt="skip")


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = mode << 16
    return made


def zip_of(*entries: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(name: str, **fields) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        made = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(made, field, value)
        archive.addfile(made)
    return out.getvalue()


def claiming(size: int) -> bytes:
    """A tar whose extended header says that it has `size` bytes."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf() + bytes(1024)


HOSTILE = {
    "climbs": zipped({"../evil.png": DOT, "a/b.png": DOT}),
    "absolute": zipped({"/tmp/threats-evil.png": DOT}),
    "backslash": zipped({"a\\..\\b.png": DOT}),
    "drive": zipped({"C:evil.png": DOT}),
    "link": zip_of((entry("a/link.png", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "device": zip_of((entry("a/device.png", stat.S_IFCHR | 0o777), b"")),
    "tar climbs": tarred({"../evil.png": DOT}, "w"),
    "tar link": tar_of("a/x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "tar hard link": tar_of("a/x.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "tar device": tar_of("a/x.png", type=tarfile.CHRTYPE),
    "tar that claims 8 GiB": claiming(2**33 - 1),
    "a million entries": million(),
    "cut off": zipped(digits(20))[:-200],
    "noise in it": zipped({"a/x.png": DOT})[:40] + bytes(60) + zipped({"a/x.png": DOT})[100:],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(kind, load, tmp_path):
    with pytest.raises(ModelworksError) as caught:
        load(HOSTILE[kind])
    assert caught.value.status in (400, 413, 415)
    assert caught.value.code != "internal"
    assert {path.name for path in tmp_path.iterdir()} == {"upload"}


@pytest.mark.parametrize("shape", ["zip", "tar.gz", "one file"])
def test_a_bomb_is_refused_within_bounds(shape, load, tmp_path):
    block = bytes(48 << 20)
    if shape == "one file":
        bomb = zipped({"a/x.png": bytes(80 << 20)})
    else:
        bomb = (zipped if shape == "zip" else tarred)({f"a/{i}.png": block for i in range(7)})
    del block
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ModelworksError) as caught:
        load(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status in (400, 413)
    assert peak < 120 << 20
    assert time.monotonic() - began < 60


def test_an_image_of_too_many_pixels_is_not_decoded(load):
    """A few kilobytes that would be gigabytes of pixels: refused by the header."""
    header = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    with pytest.raises(InvalidInput, match=r"a/huge\.png"):
        load(zipped({"a/huge.png": header + bytes(2000)}))


def test_other_archives_are_told_apart(load):
    for files, word in (({"[Content_Types].xml": b"<x/>"}, "Office"), ({"m/data.pkl": b"x"}, "PyTorch"), ({"a.bin": b"x"}, "folder")):
        with pytest.raises(UnsupportedMedia, match=word):
            load(zipped(files))
    assert [c.name for c in load(zipped({"data.csv": b"x,y\n1,2\n3,4\n"}))[0].columns] == ["x", "y"]
    with pytest.raises(InvalidInput, match=r"'lone.png' lies in no folder"):
        load(zipped({"lone.png": DOT, "a/b.png": DOT}))
