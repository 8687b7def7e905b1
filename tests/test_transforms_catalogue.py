"""What a recipe may say about transforms, and that it is refused with the right words when it says something else."""

import subprocess
import sys

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.ml.data.transforms import catalogue


def spec(op, columns=None, **params):
    return TransformSpec.model_validate({"op": op, "columns": columns, **params})


def test_aliases_become_canonical_and_parameters_stay():
    checked = catalogue.check_transforms([spec("standardize"), spec("log", ["a"], base=10)])
    assert [step.op for step in checked] == ["standardise", "log"]
    assert checked[1].params == {"base": 10}
    assert catalogue.check_transforms(checked) == checked


@pytest.mark.parametrize(
    ("step", "param", "words"),
    [
        (spec("scale"), "transforms[0]", "choose one of"),
        (spec("clip", lo=1), "transforms[0].lo", "allowed: low"),
        (spec("clip", low=2, high=1), "transforms[0]", "lower bound"),
        (spec("clip", low=1, zscore=2), "transforms[0]", "give one of"),
        (spec("clip", low_quantile=1.5), "transforms[0].low_quantile", "less than or equal to 1"),
        (spec("fill-missing", strategy="constant"), "transforms[0]", "needs a value"),
        (spec("fill-missing", strategy="mean", value=1), "transforms[0]", "goes with the strategy constant"),
        (spec("fill-missing", value=float("nan")), "transforms[0]", "finite"),
        (spec("log", base=1), "transforms[0]", "must not be 1"),
        (spec("min-max", range=[1, 0]), "transforms[0]", "low below high"),
        (spec("date-parts", parts=["century"]), "transforms[0].parts.0", "year"),
        (spec("tf-idf", ngram=[2, 1]), "transforms[0]", "shortest"),
        (spec("ordinal", order=["a", "a"]), "transforms[0]", "different"),
        (spec("cast", ["a"]), "transforms[0].to", "required"),
        (spec("drop"), "transforms[0].columns", "needs columns"),
        (spec("standardise", "petals"), "transforms[0].columns", "['petals']"),
    ],
)
def test_a_bad_step_is_refused_by_name(step, param, words):
    with pytest.raises(InvalidInput) as caught:
        catalogue.check_transforms([step])
    assert caught.value.param == param
    assert words in caught.value.message


def test_the_number_of_steps_is_bounded():
    with pytest.raises(InvalidInput, match="at most"):
        catalogue.check_transforms([spec("standardise")] * (catalogue.MAX_TRANSFORMS + 1))


def test_every_op_is_described_with_a_schema():
    listed = {entry["name"]: entry for entry in catalogue.describe()}
    assert listed.keys() == catalogue.TRANSFORMS.keys()
    assert listed["drop-missing"]["kind"] == "rows"
    assert listed["one-hot"]["default_columns"] == ["category"]
    assert listed["clip"]["parameters"]["properties"]["low_quantile"]["description"]
    assert listed["clip"]["parameters"]["additionalProperties"] is False


def test_catalogue_and_host_import_nothing_heavy():
    code = (
        "import sys, modelworks.ml.data.transforms.catalogue as c; assert 'numpy' not in sys.modules\n"
        "import modelworks.ml.data.transforms.host\n"
        "heavy = {'onnx', 'onnxruntime', 'sklearn', 'pandas', 'scipy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
