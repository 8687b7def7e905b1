"""A version of a dataset made from another: values set, rows dropped, columns renamed, rows put into splits.

Read and written a row group at a time. Rows are numbered from 1, as in the version that is edited, in every edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit
from modelworks.core.types import Column
from modelworks.ml.data import cast
from modelworks.ml.data.canonical import CanonicalFile, Digest, arrow_schema
from modelworks.ml.data.faults import MAX_FIELD, check_names, shown
from modelworks.ml.data.infer import Inferred
from modelworks.ml.data.ingest import Ingested, Progress

if TYPE_CHECKING:
    import pyarrow as pa

_FILES = ("image", "audio")


def edit(
    parquet: Path, columns: Sequence[Column], edits: Sequence[DatasetEdit], out: Path, progress: Progress | None = None
) -> Ingested:
    """Apply `edits` in order to the canonical file and write the result to `out`: those of rows together, those along
    time one by one. InvalidInput, with `param` edits[i], for what cannot be done.
    """
    from modelworks.ml.data import series

    source, done = parquet, 0
    found: Ingested | None = None
    while done < len(edits):
        stop = done + 1
        if edits[done].op not in series.OPS:
            while stop < len(edits) and edits[stop].op not in series.OPS:
                stop += 1
        target = out if stop == len(edits) else out.with_suffix(f".{stop}")
        if edits[done].op in series.OPS:
            found = series.apply(source, columns, edits[done], f"edits[{done}]", target)
        else:
            found = _edit_rows(source, columns, edits[done:stop], done, target, progress)
        source, columns, done = target, found.columns, stop
    assert found is not None
    return found


def _edit_rows(
    parquet: Path,
    columns: Sequence[Column],
    edits: Sequence[DatasetEdit],
    first: int,
    out: Path,
    progress: Progress | None,
) -> Ingested:
    """InvalidInput for a column or row that is not there, a value that does not fit, an edit that matches no row, and
    when no row is left. `first`: how many edits came before these.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(parquet, memory_map=False, pre_buffer=False) as file:
        rows = file.metadata.num_rows
        zoned = {field.name: bool(getattr(field.type, "tz", None)) for field in file.schema_arrow}
        plan = _Plan([Inferred(column.name, column.type, zoned[column.name]) for column in columns], edits, parquet, rows, first)
        digest, target = Digest(plan.columns), CanonicalFile(out, plan.columns)
        gaps: dict[str, bool] = {}
        start = kept = 0
        for group in range(file.num_row_groups):
            for batch in file.read_row_group(group).to_batches():
                ready = plan.apply(batch, start)
                for name, array in zip(ready.schema.names, ready.columns, strict=True):
                    gaps[name] = gaps.get(name, False) or array.null_count > 0
                digest.update(ready)
                target.write(ready)
                start += batch.num_rows
                kept += ready.num_rows
                if progress:
                    progress(start / max(1, rows), "editing")
        target.close()
    plan.check_matched()
    if kept == 0:
        raise InvalidInput("the edits leave no row; a dataset has at least one", code="empty", param="edits")
    named = [Column(name=column.name, type=column.type, nullable=gaps[column.name]) for column in plan.columns]
    return Ingested(kept, named, digest.hexdigest())


class _Plan:
    """The edits, checked against the columns, and how many rows each met."""

    def __init__(self, columns: list[Inferred], edits: Sequence[DatasetEdit], parquet: Path, rows: int, first: int) -> None:
        self.columns = list(columns)
        self._first = first
        self._steps: list[tuple[DatasetEdit, Any]] = []
        self._met = [0] * len(edits)
        for index, one in enumerate(edits):
            where = f"edits[{first + index}]"
            if one.rows and max(one.rows) > rows:
                raise InvalidInput(f"{where}: there is no row {max(one.rows)}; the version has {rows}", param=where)
            self._steps.append((one, self._prepare(one, where, parquet, rows)))
        check_names([column.name for column in self.columns], line=None, advice="choose another name")

    def _prepare(self, one: DatasetEdit, where: str, parquet: Path, rows: int) -> Any:
        """What the step needs at each batch: a scalar, a name, or the split of each row."""
        for name in one.where or {}:
            if self._find(name, where).type in _FILES:
                raise InvalidInput(f"{where}: {shown(name)} holds files; choose rows by number", param=where)
        if one.op == "rename":
            column = self._find(str(one.column), where)
            at = self.columns.index(column)
            self.columns[at] = Inferred(str(one.name), column.type, column.zoned)
            return str(one.name)
        if one.op == "split":
            splits = _splits(one, self._stratum(one, where, parquet), rows)
            self._add(Inferred(one.column or "split", "category"), where)
            return splits
        if one.op == "set":
            if one.type is not None:
                self._add(Inferred(str(one.column), one.type), where)
            return self._scalar(self._find(str(one.column), where), one.value, where)
        return None

    def _add(self, column: Inferred, where: str) -> None:
        known = next((one for one in self.columns if one.name == column.name), None)
        if known is None:
            self.columns.append(column)
        elif known.type != column.type:
            raise InvalidInput(f"{where}: there is a column {shown(column.name)} already, of type {known.type}", param=where)

    def _find(self, name: str, where: str) -> Inferred:
        for column in self.columns:
            if column.name == name:
                return column
        there = ", ".join(column.name for column in self.columns[:20])
        raise InvalidInput(
            f"{where}: the dataset has no column {shown(name)}; it has {there} (a set with a type adds one)",
            code="unknown_column",
            param=where,
        )

    def _scalar(self, column: Inferred, value: Any, where: str) -> pa.Scalar:
        import pyarrow as pa

        if column.type in _FILES:
            raise InvalidInput(f"{where}: files cannot be edited; upload the data again", param=where)
        if value is None:
            return pa.scalar(None, cast.arrow_type(column.type, column.zoned))
        fits = not isinstance(value, list | dict)
        fits = fits and (not isinstance(value, bool) or column.type in ("category", "text", "boolean"))
        text = str(value).lower() if isinstance(value, bool) else str(value)
        array, bad = cast.cast(pa.array([text], pa.string()), column.type, zoned=column.zoned) if fits else (None, 0)
        if bad is not None or array is None or len(text) > MAX_FIELD:
            raise InvalidInput(
                f"{where}: {shown(value)} does not fit column {shown(column.name)} of type {column.type}",
                code="bad_value",
                param=where,
            )
        return array[0]

    def _stratum(self, one: DatasetEdit, where: str, parquet: Path) -> Any:
        import pyarrow.parquet as pq

        if one.stratify is None:
            return None
        self._find(one.stratify, where)
        names = pq.read_schema(parquet).names
        if one.stratify not in names:
            raise InvalidInput(f"{where}: stratify by a column as it is named in the version", param=where)
        return pq.read_table(parquet, columns=[one.stratify]).column(0)

    # batches

    def apply(self, batch: pa.RecordBatch, start: int) -> pa.RecordBatch:
        """The edited batch, whose first row has number `start` + 1."""
        import pyarrow as pa

        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        numbers = np.arange(start + 1, start + 1 + batch.num_rows)
        for index, (one, made) in enumerate(self._steps):
            if one.op == "rename":
                arrays = {made if name == one.column else name: values for name, values in arrays.items()}
                self._met[index] += 1
                continue
            chosen = self._chosen(one, arrays, numbers)
            self._met[index] += int(chosen.sum())
            if one.op == "drop":
                keep = pa.array(~chosen)
                arrays = {name: values.filter(keep) for name, values in arrays.items()}
                numbers = numbers[~chosen]
            elif one.op == "set":
                name = str(one.column)
                arrays[name] = self._set(arrays.get(name), chosen, made, len(numbers))
            else:
                name = one.column or "split"
                labels = pa.array(made[numbers - 1], pa.string())
                arrays[name] = self._set(arrays.get(name), chosen, labels, len(numbers))
        schema = arrow_schema(self.columns)
        return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def _set(self, values: pa.Array | None, chosen: np.ndarray, made: Any, count: int) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        if values is None:
            values = pa.nulls(count, made.type)
        return pc.if_else(pa.array(chosen), made, values)

    def _chosen(self, one: DatasetEdit, arrays: dict[str, pa.Array], numbers: np.ndarray) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        chosen = np.ones(len(numbers), dtype=bool)
        if one.rows is not None:
            chosen &= np.isin(numbers, one.rows)
        for name, wanted in (one.where or {}).items():
            values = arrays[name]
            texts = pc.cast(values, pa.string()) if not pa.types.is_string(values.type) else values
            listed = wanted if isinstance(wanted, list) else [wanted]
            match = np.zeros(len(numbers), dtype=bool)
            for value in listed:
                if value is None:
                    match |= np.asarray(values.is_null())
                    continue
                column = self._find(self._now(name), "edits")
                scalar = self._scalar(column, value, f"where {name}")
                plain = scalar.cast(pa.string()) if not pa.types.is_string(scalar.type) else scalar
                match |= np.asarray(pc.equal(texts, plain).fill_null(False))
            chosen &= match
        return chosen

    def _now(self, name: str) -> str:
        """The name that a column has after all renames."""
        for one, made in self._steps:
            if one.op == "rename" and one.column == name:
                name = made
        return name

    def check_matched(self) -> None:
        for index, count in enumerate(self._met):
            if not count:
                where = f"edits[{self._first + index}]"
                raise InvalidInput(f"{where} matches no row; look at rows and where", code="no_match", param=where)


def _splits(one: DatasetEdit, stratum: Any, rows: int) -> np.ndarray:
    """[rows] texts: the shares of each group, drawn at random by the seed."""
    names = list(one.shares or {})
    bounds = np.cumsum([float(share) for share in (one.shares or {}).values()])
    random = np.random.default_rng(one.seed)
    groups = [np.arange(rows)]
    if stratum is not None:
        codes = stratum.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        groups = [np.flatnonzero(codes == code) for code in np.unique(codes)]
    out = np.empty(rows, dtype=object)
    for group in groups:
        order = random.permutation(group)
        cuts = np.round(bounds * len(group)).astype(int)
        start = 0
        for name, stop in zip(names, cuts, strict=True):
            out[order[start:stop]] = name
            start = stop
        out[order[start:]] = names[-1]
    return out
