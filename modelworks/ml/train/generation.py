"""Text generation: a small decoder that learns to go on with the texts of a column, judged by how well it foresees others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Column
from modelworks.ml.base import JobContext
from modelworks.ml.data import tokens
from modelworks.ml.evaluate.catalogue import OF_LANGUAGE, check_metrics
from modelworks.ml.evaluate.metrics import Predictions, score
from modelworks.ml.nets.decoder import Decoder, blocks, surprise
from modelworks.ml.nets.examples import MemoryExamples
from modelworks.ml.package import Manifest
from modelworks.ml.train.algorithms import check_hyperparameters
from modelworks.ml.train.checks import check_method, check_run, find
from modelworks.ml.train.course import Course

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

_CHAT = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


@dataclass(frozen=True)
class Writer:
    """What was learnt: `model` as transformers has it, its `tokenizer` as JSON, and `counts` of each token in training."""

    model: Any
    tokenizer: dict[str, Any]
    counts: np.ndarray


@dataclass(frozen=True)
class Generation(Course):
    """`batch` holds the texts; `target` [n] their bytes."""

    kind: ClassVar[str] = GENERATION

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        """It learns from the texts of the target alone."""
        if not spec.target:
            raise InvalidInput("name the column of texts to learn from in 'target'", code="no_target", param="target")
        if (target := find(columns, spec.target, "target")).type not in ("text", "category"):
            raise InvalidInput(
                f"the target {target.name!r} is of type {target.type}; text generation learns from a column of texts",
                code="bad_target",
                param="target",
            )
        for name in ("features", "transforms", "time", "user", "item", "threshold"):
            if getattr(spec, name):
                raise InvalidInput(f"text generation learns from the target's texts alone; leave {name} out", param=name)
        wanted = check_metrics(GENERATION, spec.metrics, spec.gates, among=OF_LANGUAGE)
        if spec.validation:
            check_method(spec.validation, columns, spec.target)
        check_run(spec, GENERATION)
        given = check_hyperparameters(spec.algorithm, spec.hyperparameters)
        return spec.model_copy(update={"hyperparameters": given, "features": [], "task": GENERATION, "metrics": wanted})

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Generation:
        import pyarrow as pa

        target = find(columns, spec.target, "target")
        texts = np.empty(table.num_rows, dtype=object)
        texts[:] = table.column(target.name).cast(pa.string()).fill_null("").to_pylist()
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        rows = np.flatnonzero(sizes > 0)
        if len(rows) < 2:
            raise InvalidInput(
                f"the target {target.name!r} has {len(rows)} texts; give some to learn from and others to judge by",
                code="too_few_rows",
                param="target",
            )
        return cls(spec, GENERATION, [target], {target.name: texts}, rows, sizes, None, None, given=tuple(columns))

    def _texts(self, rows: np.ndarray) -> list[str]:
        found: list[str] = self.batch[self.spec.target][rows].tolist()
        return found

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Writer:
        ctx.progress(0.0, "learning tokens")
        texts, params = self._texts(rows), self.params
        tokenizer = tokens.learn_generative(texts, params.vocabulary)
        documents = _ids(tokenizer, texts)
        size = tokens.facts(tokenizer)[0]
        features = blocks(documents, params.context)
        examples = MemoryExamples(features, np.zeros(len(features), dtype=np.float32))
        ctx.progress(0.1, "fitting")
        model = Decoder(size).read(examples, params, ctx, self.spec.stopping)
        counts = np.bincount(np.array([id for ids in documents for id in (*ids, 0)], dtype=np.int64), minlength=size)
        return Writer(model, tokenizer, counts)

    def judge(self, model: Writer, rows: np.ndarray) -> Predictions:
        documents = _ids(model.tokenizer, self._texts(rows))
        said = np.column_stack([surprise(model.model, documents, self.params.context), self.target[rows]])
        shares = np.log((model.counts + 1) / (model.counts.sum() + len(model.counts)))
        alone = np.array([-shares[[*ids, 0]].sum() for ids in documents])
        return Predictions(rows, self.target[rows], said, {"unigram": alone})

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """The perplexity of a model that knows how frequent each token is, and no more, stands beside."""
        whole = Predictions.join(found)
        loss, count, size = whole.output.sum(axis=0)
        made: dict[str, Any] = {
            "language": {"texts": len(whole.rows), "tokens": int(count), "bytes": int(size), "negative_log_likelihood": float(loss)}
        }
        if "unigram" in whole.beside:
            plain = np.column_stack([whole.beside["unigram"], whole.output[:, 1:]])
            made["baselines"] = {
                "unigram": {
                    name: {"mean": value, "std": None, "low": None, "high": None, "folds": [value]}
                    for name, value in score(GENERATION, Predictions(whole.rows, whole.true, plain), OF_LANGUAGE).items()
                }
            }
        return made

    def package(
        self, model: Writer, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        """As a hub has it, read and tried out as what a stranger uploads."""
        from transformers.utils import logging

        from modelworks.ml.decoder_import import import_decoder

        folder = workdir / "decoder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            logging.disable_progress_bar()
            model.model.save_pretrained(folder)
            (folder / "tokenizer.json").write_text(json.dumps(model.tokenizer, sort_keys=True))
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokens.END, "chat_template": _CHAT}))
            made, paths = import_decoder(folder, folder, threads=threads)
            files = {name: path.read_bytes() for name, path in paths.items()}
        finally:
            shutil.rmtree(folder)
        about = {**made.lineage, "vocabulary": len(model.counts), "parameters": sum(one.numel() for one in model.model.parameters())}
        return made.model_copy(update={**self.named(), "lineage": lineage | about, "metrics": metrics}), files


def _ids(tokenizer: dict[str, Any], texts: list[str]) -> list[list[int]]:
    """Without the token before each."""
    loaded = tokens.load(tokenizer)
    return [found.ids for found in loaded.encode_batch(texts, add_special_tokens=False)]
