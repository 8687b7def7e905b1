"""Images and sounds from a folder to an endpoint, through a real server: as a person with a folder of files does it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from modelworks.core.errors import InvalidInput
from tests.media import digits, tone, zipped
from tests.server import RunningServer, until


@pytest.fixture(scope="module")
def house(running: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    """The deployment `numerals`: a linear model of handwritten digits, from a folder of PNG files."""
    folder = tmp_path_factory.mktemp("files") / "numerals"
    for name, data in digits(250).items():
        path = folder / name.removeprefix("digits/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    client = running.client
    dataset = client.datasets.upload(folder)
    assert (dataset.name, dataset.rows) == ("numerals", 250)
    assert {column.name: column.type for column in dataset.columns} == {"image": "image", "label": "category"}
    job = client.training_jobs.wait(
        client.training_jobs.create(
            model="numerals", dataset=dataset.ref, target="label", algorithm="logistic-regression", validation={"kfold": 2}
        )
    )
    assert job.status == "succeeded", job.error
    assert job.metrics["accuracy"]["mean"] > 0.8
    assert client.models.version(str(job.model_version)).task == "image-classification"
    client.deployments.put("numerals", model="numerals")
    client.deployments.wait_ready("numerals")
    return running


def test_an_image_comes_as_base64_as_a_file_and_as_a_tensor(house: RunningServer, tmp_path: Path) -> None:
    files = digits(250)
    _, data = next((name, data) for name, data in files.items() if "/7/" in name)
    path = tmp_path / "seven.png"
    path.write_bytes(data)
    answer = house.client.deployments.predict("numerals", [{"image": path}, {"image": data}])
    assert [one.label for one in answer.outputs] == ["7", "7"]
    with house.http() as http:
        where = "/api/v1/deployments/numerals/predict"
        by_form = http.post(where, files={"image": ("x.png", data)})
        assert by_form.json()["outputs"] == [answer.outputs[0].model_dump(exclude_none=True)]
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        assert http.post(where, json={"inputs": [{"image": url}]}).json()["outputs"][0]["label"] == "7"
        body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1]}]}
        body["inputs"][0]["data"] = [base64.b64encode(data).decode()]
        oip = http.post("/v2/models/numerals/infer", json=body).json()
        assert next(one["data"] for one in oip["outputs"] if one["name"] == "label") == ["7"]
        import json

        body["inputs"][0] |= {"parameters": {"binary_data_size": len(data) + 4}}
        del body["inputs"][0]["data"]
        head = json.dumps(body).encode()
        raw = head + len(data).to_bytes(4, "little") + data
        found = http.post(
            "/v2/models/numerals/infer",
            content=raw,
            headers={"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"},
        ).json()
        assert found["outputs"] == oip["outputs"]


@pytest.mark.parametrize(
    "value",
    [
        "not base64!",
        5,
        base64.b64encode(b"no image at all").decode(),
        base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100)).decode(),
        base64.b64encode(b"RIFF\x10\0\0\0WEBPVP8 " + b"\xff" * 4000).decode(),
        base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20).decode(),
    ],
)
def test_a_malformed_image_is_a_400_that_names_the_feature(house: RunningServer, value: object) -> None:
    before = {process.pid for process in house.processes("replica")}
    with house.http() as http:
        answer = http.post("/api/v1/deployments/numerals/predict", json={"inputs": [{"image": value}]})
        assert answer.status_code == 400, answer.text
        assert answer.json()["param"] == "image"
        assert "image" in answer.json()["detail"]
        fine = http.post("/api/v1/deployments/numerals/predict", files={"image": ("x.png", next(iter(digits(1).values())))})
        assert fine.status_code == 200
    assert {process.pid for process in house.processes("replica")} == before


def test_forms_are_checked(house: RunningServer) -> None:
    with house.http() as http:
        where = "/api/v1/deployments/numerals/predict"
        for form in ({"picture": ("x.png", b"1")}, {"image": ("x.png", b"")}):
            assert http.post(where, files=form).status_code == 400
        answer = http.post(where, content=b"--b\r\n", headers={"content-type": "multipart/form-data; boundary=b"})
        assert answer.json()["code"] == "bad_form"


def test_a_corrupt_archive_ends_the_ingest_with_the_file_named(running: RunningServer) -> None:
    bad = digits(10) | {"digits/3/cut.png": b"\x89PNG\r\n\x1a\n" + bytes(20)}
    with pytest.raises(InvalidInput, match=r"cut\.png"):
        running.client.datasets.upload(zipped(bad), name="media-cut", filename="cut.zip")
    found = running.client.datasets.upload(
        zipped(bad), name="media-cut", filename="cut.zip", schema={"on_corrupt": "skip"}
    )
    assert found.rows == 10
    assert "1 file could not be decoded" in found.warnings[0]


def test_sounds_are_told_apart_by_their_pitch(running: RunningServer) -> None:
    files = {
        f"{word}/{i:02}.wav": tone(hertz + 8 * i, 0.3 + i / 100, noise=0.02, seed=i)
        for word, hertz in (("low", 300), ("high", 2000))
        for i in range(20)
    }
    client = running.client
    dataset = client.datasets.upload(zipped(files), name="pitch", filename="pitch.zip")
    job = client.training_jobs.wait(
        client.training_jobs.create(
            model="pitch",
            dataset=dataset.ref,
            target="label",
            algorithm="logistic-regression",
            transforms=[{"op": "mfcc", "bands": 24}, {"op": "pool", "segments": 3}],
        )
    )
    assert job.status == "succeeded", job.error
    assert job.metrics["accuracy"]["mean"] == 1.0
    assert client.models.version(str(job.model_version)).task == "audio-classification"
    client.deployments.put("pitch", model="pitch")
    client.deployments.wait_ready("pitch")
    answer = client.deployments.predict("pitch", [{"audio": tone(310, rate=44_100, format="FLAC")}, {"audio": tone(1990, 2)}])
    assert [one.label for one in answer.outputs] == ["low", "high"]
    client.deployments.delete("pitch")
    until(lambda: not [p for p in running.processes("replica") if " pitch " in " ".join(p.cmdline())], 20)
