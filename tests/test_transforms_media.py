"""Images, sounds and token sequences: decoded alike everywhere, transformed in the graph, in shapes or flat."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.types import Column
from modelworks.ml.data import media
from modelworks.ml.data.transforms.preparation import Preparation
from modelworks.ml.runtimes.onnx import OnnxRuntime
from tests.learning import packaged, run
from tests.media import column, digits, picture, tone


def fit(batch, kinds, *steps, shaped=True, **options):
    specs = [TransformSpec.model_validate(step) for step in steps] or None
    columns = [Column(name=name, type=kind) for name, kind in kinds.items()]
    return Preparation.fit(batch, columns, specs, accepts_missing=False, shaped=shaped, **options)


def test_images_become_pixels_in_their_shape():
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    batch = {"image": column([picture(values), picture(values, "BMP")])}
    prep = fit(batch, {"image": "image"})
    assert prep.shape == (3, 4, 4)
    assert prep.features(batch) == pytest.approx(np.stack([values.transpose(2, 0, 1) / 255.0] * 2), abs=1e-6)
    flat = fit(batch, {"image": "image"}, shaped=False)
    assert flat.features(batch) == pytest.approx(prep.features(batch).reshape(2, -1))
    assert len(flat.feature_names) == 48


def test_images_of_many_sizes_get_the_median_one():
    grey = [picture(np.full((10 + i, 20), 50 * i, np.uint8)) for i in range(3)]
    batch = {"image": column(grey)}
    assert fit(batch, {"image": "image"}).shape == (1, 11, 20)
    assert fit(batch, {"image": "image"}, {"op": "resize", "size": 6, "colour": "rgb"}).shape == (3, 6, 6)


def test_crop_and_normalise_run_in_the_graph():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (30, 8, 8), dtype=np.uint8)
    batch = {"image": column([picture(one) for one in images])}
    prep = fit(batch, {"image": "image"}, {"op": "crop", "size": 4}, {"op": "normalise"})
    cut = images[:, 2:6, 2:6] / 255.0
    want = (cut - cut.mean()) / cut.std()
    assert prep.features(batch)[:, 0] == pytest.approx(want, abs=1e-4)
    assert {node.op_type for node in prep.graph().graph.node} >= {"Slice", "Sub", "Div"}


def test_augmentation_changes_training_rows_alone():
    batch = {"image": column(list(digits(20).values()))}
    prep = fit(batch, {"image": "image"}, {"op": "augment", "flip": "horizontal", "rotate": 15, "shift": 0.2, "noise": 0.05})
    features = prep.features(batch)
    assert (features == fit(batch, {"image": "image"}).features(batch)).all()
    first, second = (prep.augment(features, np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape == features.shape
    assert not np.allclose(first, second)
    assert (first == prep.augment(features, np.random.default_rng(1))).all()


@pytest.mark.parametrize(("given", "wanted"), [(44_100, 16_000), (8_000, 16_000), (22_050, 8_000)])
def test_resampling_keeps_a_tone(given, wanted):
    values = np.sin(2 * np.pi * 500 * np.arange(given) / given).astype(np.float32)
    got = media.resample(values, given, wanted)
    assert len(got) == wanted
    want = np.sin(2 * np.pi * 500 * np.arange(wanted) / wanted)
    assert got[200:-200] == pytest.approx(want[200:-200], abs=1e-3)


def test_a_mel_spectrogram_is_that_of_the_textbook():
    batch = {"sound": column([tone(440), tone(3000, format="FLAC")])}
    prep = fit(batch, {"sound": "audio"}, {"op": "mel-spectrogram", "bands": 20, "log": False})
    got = prep.features(batch)
    assert got.shape == (2, 1, 20, 1 + (8000 - 512) // 160)
    wave = media.waveform(batch["sound"][0], 16_000, 8000, "start")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::160] * hann
    power = np.abs(np.fft.rfft(frames)) ** 2
    from modelworks.ml.data.transforms.blocks import mel_bands

    want = mel_bands(16_000, 512, 20, 20.0, 8000.0) @ power.T
    assert got[0, 0] == pytest.approx(want, rel=1e-3, abs=1e-3)
    assert got[0, 0].sum(axis=1).argmax() < got[1, 0].sum(axis=1).argmax()


def test_mfcc_and_pool_give_flat_features():
    batch = {"sound": column([tone(440), tone(880)])}
    prep = fit(batch, {"sound": "audio"}, {"op": "mfcc", "coefficients": 10}, {"op": "pool", "segments": 4}, shaped=False)
    assert prep.features(batch).shape == (2, 40)


def test_tokens_are_learnt_cut_and_padded():
    texts = np.array([f"the cat sat on mat number {i} 猫" for i in range(20)] + ["the"], dtype=object)
    prep = fit({"body": texts}, {"body": "text"}, {"op": "tokenise", "vocabulary": 600, "length": 12})
    got = prep.features({"body": texts})
    assert got.shape == (21, 12)
    (block,) = prep.blocks
    assert block.kind == "tokens"
    assert block.about["pad"] == 0
    assert got.max() < block.about["vocabulary"]
    assert (got[20] > 0).sum() == 1
    assert (got[:20, :8] > 0).all()
    again = fit({"body": texts}, {"body": "text"}, {"op": "tokenise", "tokenizer": prep.host[0]["tokenizer"], "length": 12})
    assert (again.features({"body": texts}) == got).all()


def test_several_blocks_tell_what_is_where():
    batch = {
        "x": np.array([1.0, 2.0, 3.0], np.float32),
        "image": column([picture(np.full((2, 3), i, np.uint8)) for i in range(3)]),
        "body": np.array(["one two three", "four", "five six"], dtype=object),
    }
    prep = fit(batch, {"x": "number", "image": "image", "body": "text"}, tokens=True)
    features = prep.features(batch)
    by_kind = {block.kind: features[:, block.start : block.stop].reshape(3, *block.shape) for block in prep.blocks}
    assert by_kind["image"][2] == pytest.approx(np.full((1, 2, 3), 2 / 255))
    assert by_kind["table"][:, 0] == pytest.approx([-1.2247449, 0, 1.2247449])
    assert sum(block.stop - block.start for block in prep.blocks) == features.shape[1] == len(prep.feature_names)


@pytest.mark.parametrize(
    ("step", "word"),
    [
        ({"op": "crop", "size": 99}, "does not lie inside"),
        ({"op": "normalise", "mean": [1, 2, 3], "std": [1, 1, 1]}, "channels"),
        ({"op": "mel-spectrogram"}, "mel-spectrogram works on audio"),
        ({"op": "tokenise"}, "tokenise works on"),
    ],
)
def test_what_cannot_be_is_named(step, word):
    batch = {"image": column([picture(np.zeros((4, 4), np.uint8))] * 2)}
    with pytest.raises(InvalidInput, match=word):
        fit(batch, {"image": "image"}, {**step, "columns": ["image"]})


def test_a_package_decodes_as_training_did_and_names_a_broken_file(tmp_path):
    files = digits(120)
    table = pa.table({"image": pa.array(files.values(), pa.binary()), "digit": [name.split("/")[1] for name in files]})
    columns = [Column(name="image", type="image"), Column(name="digit", type="category")]
    trained = run((table, columns), tmp_path, target="digit", algorithm="logistic-regression")
    assert trained.report["metrics"]["accuracy"]["mean"] > 0.8
    runtime = OnnxRuntime()
    runtime.load(packaged(trained, tmp_path), 1)
    whole = table["image"][0].as_py()
    assert runtime.predict({"image": column([whole])})["label"][0] == "0"
    for broken in (whole[: len(whole) // 2], b"\x89PNG nothing", b"text"):
        with pytest.raises(InvalidInput, match="image") as caught:
            runtime.predict({"image": column([whole, broken])})
        assert caught.value.param == "image"
        assert caught.value.detail["row"] == 1
