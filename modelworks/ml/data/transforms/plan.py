"""The columns of a table on their way to features, and the graph that computes them, step by step.

A column is one position in a tensor [N, width]: an op on k columns runs once on a block [N, k], not k times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import Column, ColumnType
from modelworks.ml import graph as onnx_graph
from modelworks.ml.base import Block
from modelworks.ml.data.transforms import blocks, host, labels, numeric
from modelworks.ml.graph import BOOL, FLOAT, INT64, ML, STRING, UINT8, Graph

if TYPE_CHECKING:
    import onnx

    from modelworks.ml.base import Batch
    from modelworks.ml.nets.backbone import TextBackbone

CHUNK = 8192  # rows that run through the graph at a time
CHUNK_BYTES = 32 << 20  # ... and what their widest tensor may take
Key = tuple[int, ...]


@dataclass(frozen=True)
class Current:
    """A column as it is at a step. `key`: the raw column's position, then a number for each op that it came out of.

    `complete`: never missing from here on. `host_prior`: host states that give the same values; None once only the
    graph can. `shape`: of a block, a tensor of its own behind the rows: an image, a sound, a sequence of tokens.
    `about`: what an estimator may want to know of a block.
    """

    key: Key
    name: str
    raw: str
    type: ColumnType
    tensor: str
    index: int = 0
    complete: bool = False
    host_prior: tuple[dict[str, Any], ...] | None = ()
    shape: tuple[int, ...] | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A fitted op: what it does to which columns. `fitted` is by column key; its form is the op's own."""

    op: str
    fitted: dict[Key, Any] = field(default_factory=dict)
    to: str | None = None


def raw_kind(column: Column) -> int:
    """The element type of a raw column's graph input."""
    if column.type == "integer":
        return FLOAT if column.nullable else INT64
    return {"number": FLOAT, "boolean": UINT8}.get(column.type, STRING)


class Plan:
    """Columns and graph after some steps. The same steps on the same columns give the same graph, name for name."""

    def __init__(self, columns: list[Column], only: set[str] | None = None) -> None:
        """`only`: the raw columns to carry; by default all. Keys do not depend on it."""
        self.graph = Graph({column.name for column in columns})
        self.host: list[dict[str, Any]] = []
        self.columns: list[Current] = []
        self._names = {column.name for column in columns}
        self._steps = 0
        self._sessions: dict[tuple[str, ...], Any] = {}
        for position, column in enumerate(columns):
            if only is None or column.name in only:
                tensor = self.graph.input(column.name, raw_kind(column))
                self.columns.append(Current((position,), column.name, column.name, column.type, tensor))

    def kind(self, column: Current) -> int:
        return self.graph.kinds[column.tensor]

    # conversions: they change the tensor, not the meaning

    def as_floats(self, chosen: Iterable[Current]) -> list[Current]:
        """The columns with float32 tensors, NaN = missing; int64 and uint8 ones are converted, a block of each kind."""
        columns = {column.key: column for column in chosen}
        for kind in (INT64, UINT8):
            block, members = self.block([c for c in columns.values() if self.kind(c) == kind])
            if members:
                tensor = self._to_float(block, kind, len(members))
                columns |= {c.key: replace(c, tensor=tensor, index=i) for i, c in enumerate(members)}
        return self._put(columns.values())

    def as_labels(self, column: Current) -> Current:
        """The column as strings, "" = missing: numbers as they are written, booleans as true and false."""
        kind, graph = self.kind(column), self.graph
        if kind == STRING:
            return column
        tensor = graph.pick(column.tensor, [column.index])
        if column.type == "boolean":
            code = graph.node("Cast", [self._whole(tensor, kind)], kind=INT64, to=INT64)
            text = graph.node(
                "LabelEncoder",
                [code],
                domain=ML,
                kind=STRING,
                keys_int64s=[0, 1],
                values_strings=["false", "true"],
                default_string="",
            )
            return self._put([replace(column, tensor=text, index=0, host_prior=None)])[0]
        if kind == INT64:
            missing = graph.node("Equal", [tensor, graph.constant([[INT64_MISSING]], INT64)], kind=BOOL)
        else:
            tensor = graph.node("Add", [tensor, graph.constant([[0.0]])])  # -0 is written 0
            missing = graph.node("IsNaN", [tensor], kind=BOOL)
        text = graph.node("Cast", [tensor], kind=STRING, to=STRING)
        text = graph.node("Where", [missing, graph.constant([[""]], STRING), text], kind=STRING)
        return self._put([replace(column, tensor=text, index=0, host_prior=None)])[0]

    def block(self, chosen: Iterable[Current]) -> tuple[str, list[Current]]:
        """One tensor that holds just the columns (of one kind) side by side, and the columns in its order."""
        parts: dict[str, list[Current]] = {}
        for column in chosen:
            parts.setdefault(column.tensor, []).append(column)
        if not parts:
            return "", []
        for members in parts.values():
            members.sort(key=lambda column: column.index)
        tensor = self.graph.concat(
            [self.graph.pick(name, [c.index for c in members]) for name, members in parts.items()]
        )
        return tensor, [column for members in parts.values() for column in members]

    # steps

    def apply(self, step: Step) -> None:
        """Let `step` act on those of its columns that this plan carries."""
        self._steps += 1
        chosen = [column for column in self.columns if column.key in step.fitted]
        if step.op == "drop":
            self.columns = [column for column in self.columns if column.key not in step.fitted]
        elif step.op == "cast":
            self._cast(chosen, str(step.to))
        elif step.op == "host":
            for column in chosen:
                self._host(column, step.fitted[column.key])
        elif step.op == "embed":
            for column in chosen:
                self._embed(column, step.fitted[column.key])
        elif step.op in blocks.BLOCKS:
            for column in chosen:
                tensor = blocks.BLOCKS[step.op][1](self.graph, column.tensor, step.fitted[column.key])
                self._put([replace(column, tensor=tensor, shape=self.graph.shape(tensor))])
        else:
            texts = [c for c in chosen if self.kind(c) == STRING or step.op not in numeric.NUMERIC]
            numbers = [c for c in chosen if self.kind(c) != STRING and step.op in numeric.NUMERIC]
            if numbers:
                self._numeric(step.op, self.as_floats(numbers), step.fitted)
            for column in texts:
                self._label(step.op, self.as_labels(column), step.fitted[column.key])

    def _numeric(self, op: str, chosen: list[Current], fitted: dict[Key, Any]) -> None:
        _, emit, type_ = numeric.NUMERIC[op]
        block, members = self.block(chosen)
        tensor = emit(self.graph, block, [fitted[column.key] for column in members])
        self._put(
            replace(
                column,
                tensor=tensor,
                index=index,
                type=cast(ColumnType, type_ or column.type),
                complete=column.complete or op == "fill-missing",
                host_prior=None,
            )
            for index, column in enumerate(members)
        )

    def _label(self, op: str, column: Current, fitted: Any) -> None:
        graph, key = self.graph, (*column.key, self._steps)
        if op == "fill-missing":
            filled = labels.emit_fill(graph, column.tensor, fitted)
            prior = column.host_prior
            if prior is not None:
                prior = (*prior, {"kind": "fill", "value": fitted})
            self._put([replace(column, tensor=filled, complete=True, host_prior=prior)])
        elif op == "group-rare":
            grouped = labels.emit_group_rare(graph, column.tensor, *fitted)
            self._put([replace(column, tensor=grouped, type="category", host_prior=None)])
        elif op == "ordinal":
            tensor = labels.emit_ordinal(graph, column.tensor, *fitted)
            self._put([replace(column, tensor=tensor, type="integer", complete=True, host_prior=None)])
        else:
            tensor = labels.emit_one_hot(graph, column.tensor, fitted) if fitted else ""
            self._split(
                column,
                [
                    Current(
                        (*key, i),
                        f"{column.name}={label}",
                        column.raw,
                        "boolean",
                        tensor,
                        i,
                        complete=True,
                        host_prior=None,
                    )
                    for i, label in enumerate(fitted)
                ],
            )

    def _cast(self, chosen: list[Current], to: str) -> None:
        type_ = cast(ColumnType, to)
        if to == "category":
            for column in chosen:
                self._put([replace(self.as_labels(column), type=type_)])
            return
        block, members = self.block(self.as_floats(chosen))
        if not members:
            return
        if to == "boolean":
            block = numeric.emit_boolean(self.graph, block, len(members))
        elif to == "integer":
            block = numeric.emit_integer(self.graph, block, len(members))
        self._put(replace(c, tensor=block, index=i, type=type_, host_prior=None) for i, c in enumerate(members))

    def _host(self, column: Current, state: dict[str, Any]) -> None:
        """Put a host state before the graph, after the fills that stood on the column; its output takes its place."""
        source = column.raw
        for prior in column.host_prior or ():
            target = self._free_name(f"{column.raw}:filled")
            self.host.append(prior | {"column": column.raw, "input": source, "output": target})
            source = target
        whole = state | {
            "column": column.raw,
            "input": source,
            "output": self._free_name(f"{column.raw}:{state['kind']}"),
        }
        self.host.append(whole)
        if (made := host.block_of(whole)) is not None:
            self._decode(column, whole, *made)
            return
        names = host.output_names(whole)
        tensor = self.graph.input(whole["output"], FLOAT, len(names))
        kind = state["kind"]
        # a fill before it leaves nothing missing; a text without a known term is a row of zeros
        complete = column.complete or kind in ("tf-idf", "hashing")
        if kind == "parse":
            parsed = cast(ColumnType, state["to"])
            self._put([replace(column, type=parsed, tensor=tensor, index=0, complete=complete, host_prior=None)])
            return
        key = (*column.key, self._steps)
        self._split(
            column,
            [Current((*key, i), name, column.raw, "number", tensor, i, complete, None) for i, name in enumerate(names)],
        )

    def _decode(self, column: Current, state: dict[str, Any], dtype: str, shape: tuple[int, ...]) -> None:
        """A block in the column's place: pixels as 0 to 1, samples as they are, token numbers as floats."""
        graph = self.graph
        tensor = graph.input(state["output"], {"uint8": UINT8, "int64": INT64, "float32": FLOAT}[dtype], shape=shape)
        about: dict[str, Any] = {}
        if dtype == "uint8":
            tensor = blocks.emit_pixels(graph, tensor)
        elif dtype == "int64":
            tensor = graph.node("Cast", [tensor], shape=shape, to=FLOAT)
            about = {"vocabulary": state["vocabulary"], "pad": state["pad"], "model": state.get("model")}
        else:
            about = {"rate": state["rate"]}
        complete = column.complete or dtype == "int64"  # a missing text has no tokens
        self._put(
            [replace(column, tensor=tensor, index=0, shape=shape, about=about, complete=complete, host_prior=None)]
        )

    def _embed(self, column: Current, backbone: TextBackbone) -> None:
        """The vector of a token sequence in its place, a column a number."""
        tensor, key = blocks.emit_embedding(self.graph, column.tensor, backbone), (*column.key, self._steps)
        self._split(
            column,
            [Current((*key, i), f"{column.name}:{i}", column.raw, "number", tensor, i, True, None) for i in range(backbone.width)],
        )

    # values

    def values(self, tensors: list[str], batch: Batch) -> list[np.ndarray]:
        """The tensors' values [n, width] for a raw batch, as the graph yields them."""
        names = [onnx_graph.column_of(tensor) for tensor in tensors]
        if all(self.graph.is_input(tensor) for tensor in tensors) and all(name in batch for name in names):
            columns = [batch[name] for name in names]
            return [column.reshape(-1, 1) for column in columns]
        key = tuple(tensors)
        if key not in self._sessions:
            model = self.graph.model({f"out{i}": tensor for i, tensor in enumerate(tensors)}, "values")
            self._sessions[key] = onnx_graph.session(onnx_graph.to_bytes(model))
        wanted = {onnx_graph.column_of(name) for name in self.graph.inputs_of(tensors)}
        return run(self._sessions[key], needed(self.host, wanted), batch)

    def features(self, shaped: bool) -> tuple[onnx.ModelProto, list[str], list[Block]]:
        """The finished graph with its output "features", the names of the flattened features, and their blocks.

        Features are [N, f]; with `shaped`, those of one block alone are [N, *shape].
        """
        table, members = self.block(self.as_floats([column for column in self.columns if column.shape is None]))
        parts = [table] if members else []
        names = [column.name for column in members]
        made = [Block("table", "table", (len(members),), 0, len(members))] if members else []
        for column in self.columns:
            if column.shape is None:
                continue
            width = self.graph.widths[column.tensor]
            kind = "tokens" if column.type in ("text", "category") else column.type
            made.append(Block(column.name, kind, column.shape, len(names), len(names) + width, column.about))
            names += [f"{column.name}[{index}]" for index in range(width)]
            parts.append(column.tensor)
        alone = shaped and len(made) == 1
        out = parts[0] if alone else self.graph.concat([self.graph.flat(part) for part in parts])
        return self.graph.model({"features": out}, "features"), _distinct(names), made

    def _to_float(self, block: str, kind: int, width: int) -> str:
        graph = self.graph
        number = graph.node("Cast", [block], width=width, to=FLOAT)
        if kind == INT64:
            missing = graph.node("Equal", [block, graph.constant([[INT64_MISSING]], INT64)], kind=BOOL, width=width)
        else:
            missing = graph.node("Greater", [number, graph.constant([[1.0]])], kind=BOOL, width=width)
        return graph.node("Where", [missing, graph.constant([[float("nan")]]), number], width=width)

    def _whole(self, tensor: str, kind: int) -> str:
        """A boolean's float tensor with 2 for missing, which Cast can turn into an integer."""
        if kind != FLOAT:
            return tensor
        missing = self.graph.node("IsNaN", [tensor], kind=BOOL)
        return self.graph.node("Where", [missing, self.graph.constant([[2.0]]), tensor])

    def _put(self, changed: Iterable[Current]) -> list[Current]:
        by_key = {column.key: column for column in changed}
        self.columns = [by_key.get(column.key, column) for column in self.columns]
        return list(by_key.values())

    def _split(self, column: Current, into: list[Current]) -> None:
        at = next(i for i, c in enumerate(self.columns) if c.key == column.key)
        self.columns[at : at + 1] = into

    def _free_name(self, name: str) -> str:
        while name in self._names:
            name += "'"
        self._names.add(name)
        return name


def needed(states: list[dict[str, Any]], wanted: set[str]) -> list[dict[str, Any]]:
    """Those of the host states whose outputs are wanted, and what they in turn need."""
    chosen: list[dict[str, Any]] = []
    wanted = set(wanted)
    for state in reversed(states):
        if state["output"] in wanted:
            wanted.add(state["input"])
            chosen.insert(0, state)
    return chosen


def run(session: Any, states: list[dict[str, Any]], batch: Batch) -> list[np.ndarray]:
    """Host states, then the session, CHUNK rows at a time, so that memory stays bounded by the results."""
    apply = host.compile_host(states)
    inputs = session.get_inputs()
    rows = len(next(iter(batch.values()))) if batch else 0
    parts: list[list[np.ndarray]] = []
    size = chunk_rows([*inputs, *session.get_outputs()])
    size = min(size, host.rows_at_once(states) or size)
    for start in range(0, max(rows, 1), size):
        chunk = {name: column[start : start + size] for name, column in batch.items()}
        parts.append(session.run(None, onnx_graph.feed(inputs, apply(chunk))))
    if len(parts) == 1:
        return parts[0]
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]


def chunk_rows(tensors: list[Any]) -> int:
    """How many rows to run at a time."""
    widest = max(math.prod(size for size in tensor.shape[1:] if isinstance(size, int)) for tensor in tensors)
    return max(1, min(CHUNK, CHUNK_BYTES // (4 * max(1, widest))))


def _distinct(names: list[str]) -> list[str]:
    """Names made different by a number where two columns came to the same one."""
    seen: set[str] = set(names) if len(set(names)) == len(names) else set()
    if seen:
        return names
    for index, name in enumerate(names):
        fresh, count = name, 1
        while fresh in seen:
            count += 1
            fresh = f"{name}#{count}"
        seen.add(fresh)
        names[index] = fresh
    return names
