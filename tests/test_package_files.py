"""Packages as one file: the round trip is exact, and hostile archives and foreign formats are refused within bounds."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.core.errors import InvalidInput, ModelworksError, PayloadTooLarge, UnsupportedMedia
from modelworks.ml.build import export_package, import_package, sniff
from modelworks.ml.package import Package
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import ParityMismatch, replay_parity
from tests.learning import bundled, mixed, packaged, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    trained = run(
        mixed(), folder, algorithm="logistic-regression", target="ill", features=["age", "visits", "city", "day"]
    )
    package = packaged(trained, folder)
    export_package(package.manifest, package._locate, folder / "model.mwp")
    return folder / "model.mwp"


def test_export_and_import_are_inverse_and_deterministic(exported: Path, tmp_path: Path) -> None:
    assert sniff(exported) == "package"
    manifest, files = import_package(exported, tmp_path)
    assert set(files) == {"model.onnx"}
    assert manifest.host_transforms
    by_digest = {manifest.files[name].digest: path for name, path in files.items()}
    export_package(manifest, by_digest.__getitem__, tmp_path / "again.mwp")
    assert (tmp_path / "again.mwp").read_bytes() == exported.read_bytes()
    package = Package(manifest, by_digest.__getitem__)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32


def _rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return target


def _manifest(entries: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(entries["manifest.json"])
    change(document)
    entries["manifest.json"] = json.dumps(document).encode()


def _tamper_parity(document: dict[str, Any]) -> None:
    document["parity"]["outputs"]["label"][3] = "nobody"


def _tamper_host(document: dict[str, Any]) -> None:
    document["host_transforms"][0].pop("input")


def _tamper_size(document: dict[str, Any]) -> None:
    document["files"]["model.onnx"]["size"] += 1


def _name_elsewhere(document: dict[str, Any]) -> None:
    document["files"]["../../evil"] = document["files"]["model.onnx"]


CHANGES: dict[str, Callable[[dict[str, bytes]], None]] = {
    "parent": lambda entries: entries.update({"../evil": b"x"}),
    "nested parent": lambda entries: entries.update({"files/../../evil": b"x"}),
    "absolute": lambda entries: entries.update({"/tmp/evil": b"x"}),
    "backslash": lambda entries: entries.update({"files\\evil": b"x"}),
    "hidden": lambda entries: entries.update({"files/.evil": b"x"}),
    "pickle beside": lambda entries: entries.update({"files/data.pkl": b"x"}),
    "undeclared": lambda entries: entries.update({"files/more.onnx": b"x"}),
    "missing": lambda entries: entries.__delitem__("files/model.onnx"),
    "no manifest": lambda entries: entries.__delitem__("manifest.json"),
    "not json": lambda entries: entries.update({"manifest.json": b"{"}),
    "deep json": lambda entries: entries.update({"manifest.json": b"[" * 100_000}),
    "other bytes": lambda entries: entries.update({"files/model.onnx": entries["files/model.onnx"][:-1] + b"!"}),
    "cut short": lambda entries: entries.update({"files/model.onnx": entries["files/model.onnx"][:-1]}),
    "longer": lambda entries: entries.update({"files/model.onnx": entries["files/model.onnx"] + b"!"}),
    "size": lambda entries: _manifest(entries, _tamper_size),
    "path in manifest": lambda entries: _manifest(entries, _name_elsewhere),
    "unknown field": lambda entries: _manifest(entries, lambda document: document.update(code="os.system")),
    "runtime": lambda entries: _manifest(entries, lambda document: document.update(runtime="python")),
    "host transforms": lambda entries: _manifest(entries, _tamper_host),
    "parity": lambda entries: _manifest(entries, _tamper_parity),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tampered_package_is_refused_and_writes_nothing_outside(name: str, exported: Path, tmp_path: Path) -> None:
    hostile = _rewrite(exported, tmp_path / "hostile.mwp", CHANGES[name])
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(ParityMismatch if name == "parity" else InvalidInput):
        import_package(hostile, inside)
    assert sorted(os.listdir(tmp_path)) == ["a", "hostile.mwp"]
    assert os.listdir(tmp_path / "a") == ["b"]
    assert set(os.listdir(inside)) <= {"model.onnx"}


def test_links_devices_duplicates_and_encryption_are_refused(exported: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO):
        entry = zipfile.ZipInfo("files/model.onnx")
        entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
        with zipfile.ZipFile(tmp_path / "link.mwp", "w") as archive:
            archive.writestr("manifest.json", entries["manifest.json"])
            archive.writestr(entry, b"/etc/passwd")
        with pytest.raises(InvalidInput, match="a link, a device"):
            import_package(tmp_path / "link.mwp", tmp_path)
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.mwp", "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("manifest.json", "files/model.onnx", "files/model.onnx"):
            archive.writestr(name, entries[name])
    with pytest.raises(InvalidInput, match="there twice"):
        import_package(tmp_path / "twice.mwp", tmp_path)


def test_bombs_and_a_million_entries_are_refused_early(exported: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.mwp"
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", source.read("manifest.json"))
        archive.writestr("files/model.onnx", b"\0" * 50_000_000)  # 50 MB in 50 kB
    assert bomb.stat().st_size < 100_000
    with pytest.raises(InvalidInput, match="larger than its manifest says"):
        import_package(bomb, tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size <= 2 * 1024**2
    with pytest.raises(PayloadTooLarge, match="unpacks to"):
        import_package(exported, tmp_path, max_bytes=100)
    crowd = tmp_path / "crowd.mwp"
    with zipfile.ZipFile(crowd, "w") as archive:
        for number in range(1500):
            archive.writestr(f"files/f{number}", b"")
    with pytest.raises(PayloadTooLarge, match="1500 entries"):
        import_package(crowd, tmp_path)
    # a directory that says it is small and is not, and one in ZIP64 form that says it holds a million
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**31, 0, 0)
    (tmp_path / "liar.mwp").write_bytes(b"PK\x03\x04" + b"\0" * 100 + record)
    with pytest.raises(PayloadTooLarge):
        import_package(tmp_path / "liar.mwp", tmp_path)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, 46 * 10**6, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    ending = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "wide.mwp").write_bytes(b"PK\x03\x04" + wide + locator + ending)
    with pytest.raises(PayloadTooLarge, match="1000000 entries"):
        import_package(tmp_path / "wide.mwp", tmp_path)


def test_damaged_archives_are_refused_and_never_crash(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    random = np.random.default_rng(0)
    broken = tmp_path / "broken.mwp"
    refusals: set[str] = set()
    for _ in range(60):
        data = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(0, len(data), 20):
            data[place] = random.integers(0, 256)
        broken.write_bytes(bytes(data))
        with pytest.raises(ModelworksError) as refused:
            import_package(broken, tmp_path)
        refusals.add(refused.value.code)
    assert refusals <= {"bad_package", "payload_too_large"}


class Canary:
    """A pickle of it would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def _zip(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return buffer.getvalue()


def _tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_foreign_formats_are_named_by_content_whatever_they_are_called(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma
    import zlib

    canary = tmp_path / "canary"
    loaded = pickle.dumps(Canary(canary))
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for said, data in [
        ("a pickle", loaded),
        ("a pickle", pickle.dumps(Canary(canary), protocol=2)),
        ("pickle of an old protocol", pickle.dumps(Canary(canary), protocol=0)),
        ("PyTorch checkpoint", _zip(archive__data_pkl=loaded, archive__version=b"3")),
        ("Keras archive", _zip(config_json=b"{}", model_weights_h5=b"")),
        ("NumPy archive", _zip(a_npy=array.getvalue())),
        ("ZIP archive without manifest.json", _zip(readme_txt=b"")),
        ("NumPy array", array.getvalue()),
        ("HDF5 or Keras", b"\x89HDF\r\n\x1a\n" + bytes(100)),
        ("gzip", gzip.compress(loaded)),
        ("bzip2", bz2.compress(loaded)),
        ("xz", lzma.compress(loaded)),
        ("zlib", zlib.compress(loaded)),
        ("tar archive", _tar(loaded)),
        ("safetensors", struct.pack("<Q", len(header)) + header + bytes(4)),
        ("empty", b""),
        ("no format that is known", b"\xff\xfe\x01"),
        ("no format that is known", b"{}"),
    ]:
        upload = tmp_path / "model.onnx"
        upload.write_bytes(data)
        with pytest.raises(UnsupportedMedia) as refused:
            sniff(upload)
        assert said in refused.value.message
        assert refused.value.status == 415
        assert "upload an ONNX file" in refused.value.message
    assert not canary.exists()


def test_a_runtime_that_answers_otherwise_is_refused(exported: Path, tmp_path: Path) -> None:
    manifest, files = import_package(exported, tmp_path)
    outputs = {name: [*values] for name, values in manifest.parity.outputs.items()}
    outputs["probabilities"][5] = [value + 2e-5 for value in outputs["probabilities"][5]]
    changed = manifest.model_copy(update={"parity": manifest.parity.model_copy(update={"outputs": outputs})})
    package = Package(changed, lambda _: files["model.onnx"])
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    with pytest.raises(ParityMismatch, match="'probabilities', row 5"):
        replay_parity(package, runtime)


def test_the_runtime_takes_wire_forms_and_names_what_is_wrong(tmp_path: Path) -> None:
    trained = run(
        mixed(), tmp_path, algorithm="logistic-regression", target="ill", features=["age", "visits", "member", "city"]
    )
    runtime = OnnxRuntime()
    signature = runtime.load(packaged(trained, tmp_path), 1)
    assert [(spec.name, spec.datatype) for spec in signature.inputs] == [
        ("age", "FP32"), ("visits", "FP32"), ("member", "BOOL"), ("city", "BYTES"),
    ]  # fmt: skip
    flat: dict[str, np.ndarray] = {
        "age": np.array([30.0, np.nan], np.float32), "visits": np.array([1, 2], np.float32),
        "member": np.array([1, 2], np.uint8), "city": np.array(["oslo", ""], object),
    }  # fmt: skip
    expected = runtime.predict(flat)
    wire = {name: values.reshape(-1, 1) for name, values in flat.items()}
    wire |= {"city": np.array([[b"oslo"], [b""]], object), "age": wire["age"].astype(np.float64)}
    got = runtime.predict(wire)
    assert got["label"].tolist() == expected["label"].tolist()
    np.testing.assert_array_equal(got["probabilities"], expected["probabilities"])
    one = runtime.predict({name: values[:1] for name, values in flat.items()} | {"member": np.array([True])})
    np.testing.assert_allclose(one["probabilities"], expected["probabilities"][:1], atol=1e-7)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"city": None}, "'city' is missing"),
        ({"town": flat["age"]}, "no input 'town'"),
        ({"age": flat["city"]}, "'age' must be FP32"),
        ({"city": flat["age"]}, "'city' must be texts"),
        ({"age": flat["age"][:1]}, "different numbers of rows"),
        ({"age": np.zeros((2, 3), np.float32)}, "not \\[rows, 1\\]"),
        ({"city": np.array([b"\xff\xfe", b"x"], object)}, "not UTF-8"),
    ]
    for change, said in wrong:
        inputs = {name: value for name, value in (flat | change).items() if value is not None}
        with pytest.raises(InvalidInput, match=said):
            runtime.predict(inputs)


def test_a_model_made_without_gaps_in_an_unfilled_column_refuses_them(tmp_path: Path) -> None:
    trained = run(bundled("iris"), tmp_path, algorithm="logistic-regression", transforms=["standardise"])
    assert not any(spec.nullable for spec in trained.manifest.signature.inputs)
    runtime = OnnxRuntime()
    runtime.load(packaged(trained, tmp_path), 1)
    inputs = {spec.name: np.array([1.0, np.nan], np.float32) for spec in trained.manifest.signature.inputs}
    with pytest.raises(InvalidInput, match=r"'sepal length \(cm\)' is missing in row 1"):
        runtime.predict(inputs)
