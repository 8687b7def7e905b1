"""A small decoder learnt from a column of texts: how it is judged, that a kill changes nothing, and what the endpoint says."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml.data import tokens
from modelworks.ml.nets.decoder import blocks, surprise
from tests import learning, tagging
from tests.server import RunningServer
from tests.test_courses import crashed_and_resumed, often  # noqa: F401

SMALL: dict[str, Any] = {
    "width": 32, "heads": 2, "layers": 1, "feed_forward": 64, "context": 64, "vocabulary": 300, "learning_rate": 0.02, "batch_size": 16,
}  # fmt: skip
SPEC: dict[str, Any] = {"target": "text", "algorithm": "transformer", "task": "text-generation"}


def lines(count: int) -> list[str]:
    return [" ".join(row["tokens"]) + "." for row in tagging.sentences(count)]


def table(count: int) -> learning.Table:
    return pa.table({"text": lines(count)}), [Column(name="text", type="text")]


@pytest.mark.usefixtures("often")
def test_a_decoder_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, again = crashed_and_resumed(table(60), tmp_path, **SPEC, hyperparameters={**SMALL, "epochs": 2})
    assert whole == again


def test_a_decoder_knows_more_than_how_frequent_tokens_are(tmp_path: Path) -> None:
    report = learning.run(table(150), tmp_path, **SPEC, hyperparameters={**SMALL, "epochs": 6}).report
    alone = report["details"]["baselines"]["unigram"]["perplexity"]["mean"]
    assert report["metrics"]["perplexity"]["mean"] < 0.5 * alone
    found = report["metrics"]["bits_per_byte"]["mean"] * report["details"]["language"]["bytes"] * math.log(2)
    assert found == pytest.approx(math.log(report["metrics"]["perplexity"]["mean"]) * report["details"]["language"]["tokens"])


def test_texts_are_given_back_as_they_were_and_read_in_windows() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokens.learn_generative(lines(40), 300)
    loaded = tokens.load(made)
    text = " Ann  你好 😀\n\tX"
    assert loaded.decode(loaded.encode(text).ids) == text
    assert loaded.encode(text).ids[0] == 0
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = np.random.default_rng(0).integers(1, 300, 30).tolist()
    with torch.inference_mode():
        chances = torch.log_softmax(model(input_ids=torch.tensor([[0, *ids]])).logits[0], dim=1)
        wanted = -sum(float(chances[place, id]) for place, id in enumerate([*ids, 0]))
    assert surprise(model, [[5], ids], 64)[1] == pytest.approx([wanted, 31], abs=1e-3)
    assert surprise(model, [ids], 8)[0, 1] == 31  # in windows, each token counts once
    assert blocks([[5, 6, 7], [8]], 4).tolist() == [[0, 5, 6, 7, 0], [0, 8, 0, -1, -1]]


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"target": ""}, "no_target"),
        ({"target": "n"}, "bad_target"),
        ({"features": ["n"]}, "invalid_input"),
        ({"metrics": ["rmse"]}, "unknown_metric"),
        ({"hyperparameters": {"loss": "mse"}}, "bad_hyperparameter"),
        ({"hyperparameters": {"width": 20, "heads": 4}}, "bad_hyperparameter"),
        ({"algorithm": "rnn"}, "invalid_input"),
    ],
)
def test_what_no_decoder_learns_from_is_told(spec: dict[str, Any], code: str, tmp_path: Path) -> None:
    data = pa.table({"text": lines(20), "n": range(20)}), [Column(name="text", type="text"), Column(name="n", type="integer")]
    with pytest.raises(InvalidInput) as refused:
        learning.run(data, tmp_path, **(SPEC | spec))
    assert refused.value.code == code


def foreseen(running: RunningServer, texts: list[str], folder: Path) -> float:
    """The perplexity of texts, as training computes it, by the weights of the package."""
    from transformers import LlamaForCausalLM

    with zipfile.ZipFile(running.client.models.export("lines:1", folder / "lines.zip")) as archive:
        archive.extractall(folder)
    made = json.loads((folder / "files" / "tokenizer.json").read_text())
    documents = [tokens.load(made).encode(text, add_special_tokens=False).ids for text in texts]
    nll, count = surprise(LlamaForCausalLM.from_pretrained(folder / "files").eval(), documents, 64).sum(axis=0)
    return math.exp(nll / count)


def test_texts_from_a_file_to_completions(running: RunningServer, tmp_path: Path) -> None:
    client, texts = running.client, lines(80)
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    client.datasets.upload(path, name="lines", columns={"text": "text"})
    spec = {"model": "lines", "dataset": "lines", **SPEC, "hyperparameters": {**SMALL, "epochs": 4}}
    job = client.training_jobs.wait(client.training_jobs.create(**spec))
    assert job.status == "succeeded", job.error
    client.deployments.put("lines", model="lines")
    client.deployments.wait_ready("lines", timeout=280)
    with running.http() as http:
        asked = {"model": "lines", "prompt": [text + tokens.END for text in texts[:24]], "echo": True, "logprobs": 0, "max_tokens": 0}
        choices = http.post("/v1/completions", json=asked, timeout=60).json()["choices"]
        said = [one for choice in choices for one in choice["logprobs"]["token_logprobs"][1:]]
        assert math.exp(-sum(said) / len(said)) == pytest.approx(foreseen(running, texts[:24], tmp_path), rel=1e-4)
        asked = {"model": "lines", "prompt": "Anna ", "max_tokens": 12, "temperature": 0}
        whole = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        pieces = []
        with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        assert len(pieces) > 2
        assert "".join(pieces) == whole
        chat = {"model": "lines", "messages": [{"role": "user", "content": "Anna "}], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
