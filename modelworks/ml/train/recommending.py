"""A recommender's graph: raw user and item -> the rating, what it rests on, and the best items with their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.tensors import INT64_MISSING
from modelworks.ml.graph import ML, finish, input_name, to_bytes

if TYPE_CHECKING:
    from modelworks.ml.train.recommendation import Recommendation, Taste

_SEEN_CELLS = 16_000_000  # of the table of what users had; the rest of a user with very much is recommended again
BASIS = ("factors", "user bias", "factors", "item bias", "mean", "popularity")
"""What an answer rests on: of a known user, then of another; the item known, not known, not given."""


def graph_of(course: Recommendation, model: Taste) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []
    users, items = len(model.factors.users), len(model.factors.items)
    k = min(course.params.top_k, items)

    def op(kind: str, inputs: list[str], name: str, **more: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **more))
        return name

    def constant(name: str, values: Any, dtype: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(np.asarray(values), dtype=dtype), name))
        return name

    def texts(name: str, values: list[str]) -> str:
        constants.append(helper.make_tensor(name, TensorProto.STRING, [len(values)], [one.encode() for one in values]))  # type: ignore[misc]
        return name

    given = []
    for param, column, known, missing in (
        ("user", course.columns[0], _known(course, model.users, "user"), None),
        ("item", course.columns[1], _known(course, model.items, "item"), items + 1),
    ):
        kind = TensorProto.INT64 if column.type == "integer" else TensorProto.STRING
        name = input_name(column.name)
        given.append(helper.make_tensor_value_info(name, kind, ["n", 1]))
        keys, places = list(known), list(range(len(known)))
        if missing is not None:
            keys, places = [*keys, INT64_MISSING if column.type == "integer" else ""], [*places, missing]
        flat = op("Reshape", [name, "mw/flat"], f"mw/{param}/flat")
        form = "keys_int64s" if column.type == "integer" else "keys_strings"
        op("LabelEncoder", [flat], f"mw/{param}", domain=ML, **{form: keys}, values_int64s=places, default_int64=len(known))
    constant("mw/flat", [-1], np.int64)
    f = model.factors
    zero = np.zeros((1, f.users.shape[1]), dtype=np.float32)
    constant("mw/users", np.concatenate([f.users, zero]), np.float32)
    constant("mw/items", np.concatenate([f.items, zero, zero]), np.float32)
    constant("mw/user/biases", np.append(f.user_bias, 0) + np.float32(f.mean), np.float32)
    constant("mw/item/biases", np.append(f.item_bias, [0, 0]), np.float32)
    mine = op("Gather", ["mw/users", "mw/user"], "mw/mine")
    base = op("Gather", ["mw/user/biases", "mw/user"], "mw/base")
    theirs = op("Gather", ["mw/items", "mw/item"], "mw/theirs")
    product = op("ReduceSum", [op("Mul", [mine, theirs], "mw/products"), constant("mw/one", [1], np.int64)], "mw/product", keepdims=0)
    said = op("Add", [op("Add", [product, base], "mw/said/1"), op("Gather", ["mw/item/biases", "mw/item"], "mw/bias")], "mw/said")
    if not course.clicks:
        low, high = constant("mw/low", model.low, np.float32), constant("mw/high", model.high, np.float32)
        said = op("Clip", [said, low, high], "mw/clipped")
    gap = np.zeros(items + 2, dtype=np.float32)
    gap[-1] = np.nan  # no item, no rating
    op("Add", [said, op("Gather", [constant("mw/gap", gap, np.float32), "mw/item"], "mw/asked")], "value")
    # what it rests on
    states = np.zeros(items + 2, dtype=np.int64)
    states[items:] = [1, 2]
    strange = np.zeros(users + 1, dtype=np.int64)
    strange[-1] = 3
    state = op("Add", [
        op("Gather", [constant("mw/states", states, np.int64), "mw/item"], "mw/state"),
        op("Gather", [constant("mw/strange", strange, np.int64), "mw/user"], "mw/stranger"),
    ], "mw/which")  # fmt: skip
    op("Gather", [texts("mw/bases", list(BASIS)), state], "basis")
    # the best items
    transposed = constant("mw/catalogue", f.items.T, np.float32)
    scores = op("Add", [op("MatMul", [mine, transposed], "mw/all/1"), constant("mw/popular", f.item_bias, np.float32)], "mw/all/2")
    scores = op("Add", [scores, op("Unsqueeze", [base, "mw/one"], "mw/base/column")], "mw/all")
    if course.params.exclude_seen:
        seen = constant("mw/had", _had(model), np.int64)
        own = op("Gather", [seen, "mw/user"], "mw/had/own")
        wide = op("Pad", [scores, constant("mw/pads", [0, 0, 0, 1], np.int64)], "mw/all/wide")
        hidden = op("Expand", [constant("mw/hidden", [[-np.inf]], np.float32), op("Shape", [own], "mw/had/shape")], "mw/hide")
        wide = op("ScatterElements", [wide, own, hidden], "mw/left/wide", axis=1)
        ends = constant("mw/ends", [items], np.int64)
        scores = op("Slice", [wide, constant("mw/starts", [0], np.int64), ends, "mw/one"], "mw/left")
    nodes.append(helper.make_node("TopK", [scores, constant("mw/k", [k], np.int64)], ["mw/best", "mw/places"], name="mw/best", axis=1))
    none = op("IsInf", ["mw/best"], "mw/none")
    shown = op("Where", [none, constant("mw/nobody", items, np.int64), "mw/places"], "mw/shown")
    named = [str(one) for one in _known(course, model.items, "item")]
    op("Gather", [texts("mw/names", [*named, ""]), shown], "items")
    op("Where", [none, constant("mw/nan", np.nan, np.float32), "mw/best"], "scores")
    made = [
        helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("basis", TensorProto.STRING, ["n"]),
        helper.make_tensor_value_info("items", TensorProto.STRING, ["n", k]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", k]),
    ]
    whole = finish(helper.make_graph(nodes, "recommender", given, made, initializer=constants))
    onnx.checker.check_model(whole)
    return to_bytes(whole)


def _known(course: Recommendation, places: np.ndarray, param: str) -> list[Any]:
    """The names that were learnt, in the order of their vectors."""
    there = np.flatnonzero(places >= 0)
    ordered = there[np.argsort(places[there], kind="stable")]
    return [course.names[param][one] for one in ordered.tolist()]


def _had(model: Taste) -> np.ndarray:
    """[users + 1, most]: the numbers of the items that a user had, filled up by one that is none."""
    none = len(model.factors.items)
    most = max(1, max((len(one) for one in model.had), default=1))
    most = min(most, max(1, _SEEN_CELLS // (len(model.had) + 1)))
    table = np.full((len(model.had) + 1, most), none, dtype=np.int64)
    for row, one in enumerate(model.had):
        table[row, : min(len(one), most)] = one[:most]
    return table
