"""A text encoder from outside (as sentence-transformers keeps them) becomes a package: exported to ONNX once, with its
pooling in the graph, and checked against the model it came from.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.embedding import EMBEDDING, RERANK, RERANK_SIGNATURE, embedding_signature
from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.ml.folder import config_of, licence_of, read_json, weights_of
from modelworks.ml.package import Manifest, Package, PackageFile, ParitySamples
from modelworks.ml.runtimes.encoder import (
    MODEL_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    EncoderRuntime,
    Settings,
    settings_bytes,
)
from modelworks.ml.runtimes.parity import difference

if TYPE_CHECKING:
    import torch

# encoders that attend both ways and take the mask as a bias
FAMILIES = ("albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len")
TOLERANCE = 1e-4
MAX_WEIGHTS = 2 * 1024**3 - 64 * 1024**2  # what one ONNX file holds
_MASKED = -1e9
_TEXTS = (
    "A cat sits on the mat.",
    "Die Katze sitzt auf der Matte, und draußen regnet es seit drei Tagen ohne Unterlass.",
    "x",
)


def import_encoder(
    folder: Path, workdir: Path, *, task: str, licence: str | None = None, threads: int = 1
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files of a package that serves the staged model in `folder` as `task`.

    InvalidInput for a family that cannot be exported, and when the graph does not answer as the model does.
    """
    try:
        import torch
        from transformers import AutoModel, AutoModelForSequenceClassification
    except ImportError:
        raise MissingExtra("text encoders are converted by torch; pip install 'modelworks[nets]'") from None
    config = config_of(folder)
    if config["model_type"] not in FAMILIES:
        raise InvalidInput(
            f"encoders of the family {config['model_type'][:80]!r} cannot be converted; known are {', '.join(FAMILIES)}",
            code="unsupported_model",
        )
    if sum(path.stat().st_size for path in weights_of(folder)) > MAX_WEIGHTS:
        raise InvalidInput("the encoder has more than 2 GiB of weights, which one ONNX file cannot hold")
    torch.set_num_threads(threads)
    if task == RERANK and config.get("id2label") is not None and len(config["id2label"]) != 1:
        raise InvalidInput("a rerank model has one label, a score; this one has several", code="unsupported_model")
    pooling, normalised = _pooling(folder) if task == EMBEDDING else ("", False)
    kind = AutoModel if task == EMBEDDING else AutoModelForSequenceClassification
    settings = Settings(
        max_tokens=_max_tokens(folder, config),
        pad_id=int(config.get("pad_token_id") or 0),
        types=task == RERANK and int(config.get("type_vocab_size") or 0) > 1,
        pooling=pooling,
        normalised=normalised,
    )
    try:
        model = kind.from_pretrained(
            folder, attn_implementation="eager", local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"transformers cannot load this model: {str(error)[:300]}", code="bad_model") from None
    files = {name: workdir / name for name in (MODEL_FILE, TOKENIZER_FILE, SETTINGS_FILE)}
    _tokenizer(folder, files[TOKENIZER_FILE])
    files[SETTINGS_FILE].write_bytes(settings_bytes(settings))
    _export(model, settings, files[MODEL_FILE])
    signature = embedding_signature(int(model.config.hidden_size)) if task == EMBEDDING else RERANK_SIGNATURE
    manifest = Manifest(
        task=task,
        runtime="encoder",
        algorithm=config["model_type"],
        signature=signature,
        files={name: PackageFile.of(path) for name, path in files.items()},
        lineage={"format": "safetensors", "pooling": pooling, "context_length": settings.max_tokens},
        licence=licence or licence_of(folder),
    )
    return manifest.model_copy(update={"parity": _prove(manifest, files, model, settings, threads)}), files


def _pooling(folder: Path) -> tuple[str, bool]:
    """How token vectors become one, and whether it is scaled to unit length: from modules.json, else the plain mean."""
    modules = read_json(folder / "modules.json", [])
    pooling, normalised = "mean", False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found = read_json(folder / str(module.get("path", "")) / "config.json", {})
            on = [name for name in POOLINGS if found.get(f"pooling_mode_{_LONG.get(name, name)}")]
            if isinstance(found.get("pooling_mode"), str):
                on = [found["pooling_mode"]]
            if len(on) != 1 or on[0] not in POOLINGS:
                raise InvalidInput(
                    f"its pooling is none of {', '.join(POOLINGS)} alone, and others are not converted",
                    code="unsupported_model",
                )
            pooling = on[0]
        elif kind == "Normalize":
            normalised = True
        elif kind != "Transformer":
            raise InvalidInput(f"its module {kind[:80]!r} is not converted", code="unsupported_model")
    return pooling, normalised


_LONG = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens"}


def _max_tokens(folder: Path, config: dict[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or 512)
    if config["model_type"] in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= int(config.get("pad_token_id") or 1) + 1  # their positions begin after the padding's
    said = [
        read_json(folder / "sentence_bert_config.json", {}).get("max_seq_length"),
        read_json(folder / "tokenizer_config.json", {}).get("model_max_length"),
    ]
    return min([positions, *(int(one) for one in said if isinstance(one, int | float) and one >= 8)])


def _tokenizer(folder: Path, target: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", target)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.save(str(target))
    except Exception as error:  # what the many tokenizers raise
        raise InvalidInput(f"its tokenizer cannot be read: {str(error)[:200]}", code="bad_model") from None


def _net(model: Any, settings: Settings) -> torch.nn.Module:
    """Token ids and their mask to the vector or score of each row."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            # the bias itself, as tracing does not follow how the library makes it
            bias = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * _MASKED
            more = {"token_type_ids": token_type_ids} if settings.types else {}
            out = self.model(input_ids=input_ids, attention_mask=bias, **more)
            if not settings.pooling:
                return torch.sigmoid(out.logits[:, 0])
            vector = _pool(settings.pooling, out.last_hidden_state, attention_mask)
            return torch.nn.functional.normalize(vector, dim=1) if settings.normalised else vector

    return Net().eval()


def _pool(pooling: str, hidden: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "max":
        return (hidden + (1.0 - weights) * _MASKED).amax(dim=1)
    total, count = (hidden * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)
    return total / (count if pooling == "mean" else count.sqrt())


def _export(model: Any, settings: Settings, target: Path) -> None:
    """Traced with a padded row, at free sizes; the same model gives the same bytes."""
    import torch

    ids = torch.full((2, 7), int(settings.pad_id))
    ids[0, :], ids[1, :5] = torch.arange(5, 12), torch.arange(3, 8)
    mask = (torch.arange(7) < torch.tensor([[7], [5]])).to(torch.int64)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if settings.types else [])]
    sample = (ids, mask, torch.zeros_like(ids)) if settings.types else (ids, mask)
    free = {name: {0: "rows", 1: "length"} for name in names} | {"output": {0: "rows"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _net(model, settings), sample, str(target), dynamo=False, opset_version=18,
            input_names=names, output_names=["output"], dynamic_axes=free,
        )  # fmt: skip


def _prove(manifest: Manifest, files: dict[str, Path], model: Any, settings: Settings, threads: int) -> ParitySamples:
    """Parity samples, from the model itself: each row alone, without padding. InvalidInput when the package differs."""
    import torch
    from tokenizers import Tokenizer

    by_digest = {manifest.files[name].digest: path for name, path in files.items()}
    runtime = EncoderRuntime()
    runtime.load(Package(manifest, by_digest.__getitem__), threads)
    tokenizer = Tokenizer.from_file(str(files[TOKENIZER_FILE]))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if manifest.task == EMBEDDING:
        candidates, name = [{"text": text} for text in _TEXTS], "embedding"
    else:
        candidates, name = [{"query": _TEXTS[0], "document": text} for text in _TEXTS], "score"
    rows: list[dict[str, Any]] = []
    found: list[Any] = []
    counts: list[int] = []
    for row in candidates:
        one = tokenizer.encode(*row.values())  # type: ignore[arg-type]
        if len(one.ids) > settings.max_tokens:
            continue
        rows.append(row)
        ids, mask, types = torch.tensor([one.ids]), torch.tensor([one.attention_mask]), torch.tensor([one.type_ids])
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if settings.types else {}))
            if settings.pooling:
                vector = _pool(settings.pooling, out.last_hidden_state, mask)[0]
                value = torch.nn.functional.normalize(vector, dim=0) if settings.normalised else vector
            else:
                value = torch.sigmoid(out.logits[0, 0])
        found.append(value.double().numpy().round(6).tolist())
        counts.append(len(one.ids))
    answers = runtime.predict({key: np.array([row[key] for row in rows], dtype=object) for key in rows[0]})
    runtime.close()
    expected = {name: found, "tokens": counts}
    if reason := difference(expected, answers, TOLERANCE):
        raise InvalidInput(f"the exported graph does not answer as the model does: {reason}", code="bad_model")
    return ParitySamples(inputs=rows, outputs=expected, tolerance=TOLERANCE)
