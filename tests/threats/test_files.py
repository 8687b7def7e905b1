"""Row 2: code in files. Every upload is told by its content, whatever it is called, and refused with what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import ModelworksError
from modelworks.core.specs import TableSchema
from modelworks.ml.build import sniff as sniff_model
from modelworks.ml.data.readers import sniff as sniff_table
from modelworks.ml.llm_import import read_gguf
from modelworks.ml.onnx_import import check_onnx
from tests.threats.conftest import Estate
from tests.threats.hostile_files import CODE, GRAPHS, declaring, graph, holding
from tests.threats.probe import Probe, together

DATASETS, MODELS = "/api/v1/datasets", "/api/v1/models/threats-upload/versions"
NAMES = ("model.onnx", "data.csv", "data.parquet", "model.zip", "data.jsonl", "data", "model.pkl", "x.arrow", "x.tsv")
REFUSED = (400, 413, 415)
# what is sent to the server itself; each kind is also tried on the functions that judge it, under every name
SENT = {
    MODELS: {"pickle of protocol 5": "model.onnx", "torch": "model.zip"},
    DATASETS: {"joblib by zlib": "data.csv"},
}


def upload(probe: Probe, route: str, content: bytes, name: str) -> Any:
    fields = {"name": "threats-upload"} if route == DATASETS else {}
    return probe.post(route, data=fields, files={"file": (name, content)})


def test_code_is_refused_by_both_uploads(estate: Estate, canary: Path) -> None:
    gateway, worker = (estate.server.processes(kind)[0].pid for kind in ("gateway", "worker"))
    with estate.probe() as probe:
        uploads = [(route, CODE[kind](canary), name) for route, kinds in SENT.items() for kind, name in kinds.items()]
        uploads.append((MODELS, GRAPHS["weights above"], "model.onnx"))
        package = probe.get("/api/v1/models/iris/versions/1/export").content
        evil = f"open({str(canary)!r}, 'w')"
        uploads += [
            (MODELS, changed, "x.zip")
            for changed in (
                declaring(package, host_transforms=[{"op": "eval", "code": evil}]),
                holding(package, graph(outside="../../secret.key")),
            )
        ]
        answers = together([lambda one=one: upload(probe, *one) for one in uploads], threads=3)
        for (route, _, name), answer in zip(uploads, answers, strict=True):
            assert answer.status_code in REFUSED, (route, name, answer.status_code, answer.text[:500])
            problem = answer.json()
            assert problem["code"] != "internal"
            assert 20 < len(problem["detail"]) < 1000
        assert probe.get("/api/v1/models/threats-upload").status_code == 404
        assert probe.get("/api/v1/datasets/threats-upload").status_code == 404
        assert probe.get("/v2/models/iris/ready").status_code == 200
    assert [estate.server.processes(kind)[0].pid for kind in ("gateway", "worker")] == [gateway, worker]


def test_the_name_never_decides(canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    for kind, make in CODE.items():
        path.write_bytes(make(canary))
        for name in NAMES:
            with pytest.raises(ModelworksError) as caught:
                sniff_table(path, name, TableSchema())
            assert caught.value.status in REFUSED, (kind, name)
        with pytest.raises(ModelworksError) as caught:
            _read_model(path)
        assert caught.value.status in REFUSED, kind


def _read_model(path: Path) -> None:
    if sniff_model(path) == "gguf":  # a kind that is taken: its header is what refuses
        read_gguf(path)


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_that_reaches_out_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64)
    path = tmp_path / "model.onnx"
    path.write_bytes(graph())
    check_onnx(path)  # the same graph with its weights inside is fine
    path.write_bytes(GRAPHS[kind])
    with pytest.raises(ModelworksError) as caught:
        check_onnx(path)
    assert caught.value.status in REFUSED


def test_a_pickle_in_a_cell_is_a_text(estate: Estate, canary: Path) -> None:
    text = CODE["pickle of protocol 0"](canary).decode()
    table = "a,b\n" + "".join(f'"{text}",{number}\n' for number in range(3))
    with estate.probe() as probe:
        answer = probe.post(
            DATASETS, data={"name": "threats-cells"}, files={"file": ("x.csv", table.encode())}, said=text
        )
        assert answer.status_code == 201, answer.text
        assert answer.json()["rows"] == 3
