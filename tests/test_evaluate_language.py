"""Perplexity of texts against an independent computation: the same weights in transformers, in 32 bits."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.core.types import Column
from modelworks.ml.evaluate import language
from modelworks.ml.evaluate.evaluate import Evaluated, evaluate
from modelworks.ml.llm_import import import_gguf
from modelworks.ml.package import Package
from tests.learning import Context, Crash
from tests.tiny_gguf import make_qwen2

NEEDED = ("xllamacpp", "gguf", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
TEXTS = ["Hello world", "the cat sat on the mat", None, "ZZ▶ é!", "   "]
COLUMNS = [Column(name="id", type="integer"), Column(name="text", type="text", nullable=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Any]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = make_qwen2(folder / "tiny.gguf")
    manifest, files = import_gguf(folder / "tiny.gguf", folder)
    return Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), model


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})


def measured(package: Package, ctx: Context, texts: list[str | None] = TEXTS, other: Package | None = None, **more: Any) -> Evaluated:
    spec = EvaluationSpec.model_validate({"model": "m", "method": {"test": "d"}, **more})
    return evaluate(spec, package, table(texts), COLUMNS, ctx, other=other)


def losses(model: Any, text: str) -> list[float]:
    """Of each token but the first: bytes, and `th`."""
    import torch

    ids = [257 if one == 0 else one for one in text.replace("th", "\0").encode()]
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [-float(found[at - 1, ids[at]]) for at in range(1, len(ids))]


def test_perplexity_is_that_of_the_weights(made: tuple[Package, Any], tmp_path: Path) -> None:
    package, model = made
    found = measured(package, Context(tmp_path), slices=["id < 1"], gates=[{"metric": "perplexity", "at_most": 2.0}])
    each = [losses(model, text) for text in (TEXTS[0], TEXTS[1], TEXTS[3]) if text]
    mean = sum(map(sum, each)) / sum(map(len, each))
    assert found.metrics["perplexity"]["mean"] == pytest.approx(math.exp(mean), rel=2e-3)
    assert found.metrics["bits_per_byte"]["mean"] == pytest.approx(sum(map(sum, each)) / math.log(2) / 38, rel=1e-3)  # of 38 bytes
    assert found.details["language"]["tokens"] == sum(map(len, each))
    assert found.details["test_rows"] == [3]
    assert "2 rows without a text are left out" in found.details["notes"]
    (first,) = found.details["slices"]
    assert first["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(sum(each[0]) / len(each[0])), rel=2e-3)
    assert [gate["passed"] for gate in found.details["gates"]] == [False]
    with pytest.raises(InvalidInput, match="choose from: perplexity, bits_per_byte"):
        measured(package, Context(tmp_path), metrics=["bleu"])


def test_a_long_text_is_cut_and_a_kill_repeats_no_portion(
    made: tuple[Package, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = made
    monkeypatch.setattr(language, "_PORTION", 2)
    texts: list[str | None] = ["a b c d " * 60, "short", "other words"]  # the first has more tokens than the context
    kept: dict[str, bytes] = {}
    with pytest.raises(Crash):
        measured(package, Context(tmp_path, kept, fail_after=1), texts)
    assert list(kept) == ["texts-0-0"]
    found = measured(package, Context(tmp_path, kept), texts, package)
    assert any("measured in pieces" in note for note in found.details["notes"])
    assert found.details["comparison"]["verdict"] == "no significant difference"
    again = measured(package, Context(tmp_path), texts).metrics
    assert again["perplexity"]["mean"] == pytest.approx(found.metrics["perplexity"]["mean"], rel=1e-3)
