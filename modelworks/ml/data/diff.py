"""What changed between two versions of a dataset: rows, columns and how values are distributed, by duckdb, out of core."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml.data.parquet import quoted

if TYPE_CHECKING:
    import duckdb

SAMPLES = 20  # rows that are shown of each kind
_BINS = 10
_VALUES = 50  # categories whose shares are compared; the rest is one
_SHOWN = 200  # characters of a value
_PSI = 0.2  # from here on, a distribution is said to have moved (a usual rule of thumb)
_KS = 0.1
_LEAST_SHARE = 1e-4
_NUMBERS = ("number", "integer")
_FILES = ("image", "audio")


def diff(
    before: Path, after: Path, old: Sequence[Column], new: Sequence[Column], key: str | None = None
) -> dict[str, Any]:
    """`before` and `after` are canonical Parquet files.

    rows: {from, to, added, removed, changed, unchanged}; changed is null without a `key`, and rows are then compared by
    their whole content. columns: {added, removed, changed: [{name, from, to}]}. distributions: of each column that both
    have {name, type, psi, ks, moved, missing: {from, to}, ...}. samples: some of the rows.
    InvalidInput for a key that is not a column of both, or not unique.
    """
    mine, other = {column.name: column for column in old}, {column.name: column for column in new}
    both = [name for name in mine if name in other]
    if key is not None and key not in both:
        raise InvalidInput(
            f"there is no column {key[:80]!r} in both versions; choose one of {', '.join(both[:20])}", param="key"
        )
    with _open(before, after) as connection:
        counts = {table: _one(connection, f"SELECT count(*) FROM {table}")[0] for table in ("a", "b")}
        compared = [name for name in both if mine[name].type == other[name].type]
        found = _keyed(connection, key, compared, mine) if key is not None else _whole(connection, compared, mine)
        return {
            "key": key,
            "rows": {"from": counts["a"], "to": counts["b"], **found.pop("rows")},
            "columns": {
                "added": [other[name].model_dump() for name in other if name not in mine],
                "removed": [mine[name].model_dump() for name in mine if name not in other],
                "changed": [
                    {"name": name, "from": mine[name].type, "to": other[name].type}
                    for name in both
                    if mine[name].type != other[name].type
                ],
            },
            "distributions": [_distribution(connection, mine[name], counts) for name in compared],
            **found,
        }


@contextmanager
def _open(before: Path, after: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The two files as the views a and b, with their row numbers as file_row_number."""
    import tempfile

    import duckdb

    with tempfile.TemporaryDirectory(prefix="diff-", dir=Path.cwd()) as spill:
        connection = duckdb.connect(
            ":memory:", config={"threads": 2, "memory_limit": "1GB", "temp_directory": spill, "autoload_known_extensions": False}
        )
        try:
            paths = ["'" + str(path.absolute()).replace("'", "''") + "'" for path in (before, after)]
            connection.execute(f"SET allowed_paths = [{', '.join(paths)}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET lock_configuration = true")
            for table, path in zip(("a", "b"), paths, strict=True):
                connection.execute(f"CREATE VIEW {table} AS FROM read_parquet({path}, file_row_number = true)")
            yield connection
        finally:
            connection.close()


def _one(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
    found = connection.execute(sql, list(parameters)).fetchall()
    return tuple(found[0])


# rows


def _whole(connection: duckdb.DuckDBPyConnection, names: list[str], columns: dict[str, Column]) -> dict[str, Any]:
    """Rows as a whole: how many times each content is there, in the columns that both versions have in one type."""
    if not names:
        nothing = {"added": None, "removed": None, "changed": None, "unchanged": None}
        return {"rows": nothing, "samples": {}}
    content = f"hash({', '.join(quoted(name) for name in names)})"
    for table in ("a", "b"):
        connection.execute(
            f"CREATE TEMP TABLE {table}_rows AS SELECT {content} AS h, count(*) AS n, min(file_row_number) AS row "
            f"FROM {table} GROUP BY h"
        )
    added, removed, same = _one(
        connection,
        "SELECT sum(greatest(coalesce(b_rows.n, 0) - coalesce(a_rows.n, 0), 0)), "
        "sum(greatest(coalesce(a_rows.n, 0) - coalesce(b_rows.n, 0), 0)), "
        "sum(least(coalesce(a_rows.n, 0), coalesce(b_rows.n, 0))) FROM a_rows FULL JOIN b_rows USING (h)",
    )
    samples = {}
    for word, table, other in (("added", "b", "a"), ("removed", "a", "b")):
        rows = connection.execute(
            f"SELECT {table}_rows.row FROM {table}_rows LEFT JOIN {other}_rows USING (h) "
            f"WHERE {table}_rows.n > coalesce({other}_rows.n, 0) ORDER BY 1 LIMIT {SAMPLES}"
        ).fetchall()
        samples[word] = _rows(connection, table, [row for (row,) in rows], names, columns)
    counts = {"added": int(added or 0), "removed": int(removed or 0), "changed": None, "unchanged": int(same or 0)}
    return {"rows": counts, "samples": samples}


def _keyed(connection: duckdb.DuckDBPyConnection, key: str, names: list[str], columns: dict[str, Column]) -> dict[str, Any]:
    """Rows by the value of `key`: added, removed, or changed in which columns."""
    if key not in names or columns[key].type in _FILES:
        raise InvalidInput(f"the column {key[:80]!r} cannot be the key: its type differs, or holds files", param="key")
    name = quoted(key)
    for table, word in (("a", "from"), ("b", "to")):
        rows, present, distinct = _one(connection, f"SELECT count(*), count({name}), count(DISTINCT {name}) FROM {table}")
        if not rows == present == distinct:
            raise InvalidInput(
                f"the column {key[:80]!r} is no key of the version `{word}`: {rows - distinct} of {rows} rows repeat a value or "
                "miss one; choose another column, or none to compare whole rows",
                code="not_a_key",
                param="key",
            )
    others = [one for one in names if one != key]
    differs = {one: f"a.{quoted(one)} IS DISTINCT FROM b.{quoted(one)}" for one in others}
    some = " OR ".join(differs.values()) or "false"
    joined = f"a JOIN b ON a.{name} = b.{name}"
    both, changed = _one(connection, f"SELECT count(*), count(*) FILTER (WHERE {some}) FROM {joined}")
    counts = _one(connection, "SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)")
    by_column = {}
    if others:
        selected = ", ".join(f"count(*) FILTER (WHERE {test})" for test in differs.values())
        by_column = dict(zip(others, _one(connection, f"SELECT {selected} FROM {joined}"), strict=True))
    samples: dict[str, list[Any]] = {}
    for word, table, other in (("added", "b", "a"), ("removed", "a", "b")):
        rows = connection.execute(
            f"SELECT {table}.file_row_number FROM {table} ANTI JOIN {other} ON a.{name} = b.{name} ORDER BY 1 LIMIT {SAMPLES}"
        ).fetchall()
        samples[word] = _rows(connection, table, [row for (row,) in rows], names, columns)
    pairs = connection.execute(
        f"SELECT a.file_row_number, b.file_row_number FROM {joined} WHERE {some} ORDER BY 2 LIMIT {SAMPLES}"
    ).fetchall()
    first, second = (_rows(connection, table, [pair[at] for pair in pairs], names, columns) for at, table in enumerate("ab"))
    samples["changed"] = [
        {
            key: new["values"][key],
            "row": {"from": old["row"], "to": new["row"]},
            "columns": {
                one: {"from": old["values"][one], "to": new["values"][one]}
                for one in others
                if old["values"][one] != new["values"][one]
            },
        }
        for old, new in zip(first, second, strict=True)
    ]
    return {
        "rows": {"added": counts[1] - both, "removed": counts[0] - both, "changed": changed, "unchanged": both - changed},
        "changed_values": {one: count for one, count in by_column.items() if count},
        "samples": samples,
    }


def _rows(
    connection: duckdb.DuckDBPyConnection, table: str, rows: list[int], names: list[str], columns: dict[str, Column]
) -> list[dict[str, Any]]:
    """Some rows as JSON, in order of `rows`: {"row": its number from 1, "values"}. Files by their digests."""
    if not rows:
        return []
    shown = ", ".join(
        f"sha256({quoted(name)})" if columns[name].type in _FILES
        else f"left({quoted(name)}::VARCHAR, {_SHOWN})" if columns[name].type in ("text", "category", "time", "sequence")
        else quoted(name)
        for name in names
    )  # fmt: skip
    listed = ", ".join(map(str, rows))
    found = connection.execute(
        f"SELECT file_row_number, {shown} FROM {table} WHERE file_row_number IN ({listed})"
    ).fetchall()
    by_row = {row[0]: {"row": row[0] + 1, "values": dict(zip(names, map(_json, row[1:]), strict=True))} for row in found}
    return [by_row[row] for row in rows]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# distributions


def _distribution(connection: duckdb.DuckDBPyConnection, column: Column, counts: dict[str, int]) -> dict[str, Any]:
    """psi: the population stability index; ks: the greatest difference of the two cumulative distributions.

    Numbers by ten quantiles of the first version; categories by value; times by the moment; texts, sequences and files by length.
    """
    name = quoted(column.name)
    missing = {
        word: counts[table] - _one(connection, f"SELECT count({name}) FROM {table}")[0]
        for table, word in (("a", "from"), ("b", "to"))
    }
    out: dict[str, Any] = {"name": column.name, "type": column.type, "missing": missing}
    if column.type in ("category", "boolean"):
        psi, ks = _psi(_shares_by_value(connection, name)), None
    else:
        long = f"length({name})::DOUBLE"
        value = {"time": f"epoch_us({name})::DOUBLE", "text": long, "sequence": long}.get(column.type, f"{name}::DOUBLE")
        value = f"octet_length({name})::DOUBLE" if column.type in _FILES else value
        psi, ks = _psi(_shares_by_quantile(connection, name, value)), _ks(connection, name, value)
        if column.type in _NUMBERS:
            for table, word in (("a", "from"), ("b", "to")):
                mean, low, high = _one(connection, f"SELECT avg({value}), min({value}), max({value}) FROM {table}")
                out.setdefault("mean", {})[word], out.setdefault("range", {})[word] = _json(mean), [_json(low), _json(high)]
    present = {table: counts[table] - missing[word] for table, word in (("a", "from"), ("b", "to"))}
    moved = psi is not None and psi >= _PSI
    if ks is not None and all(present.values()):
        # the critical value of the two-sample test at 1 %
        moved = moved or ks >= max(_KS, 1.63 * math.sqrt(sum(present.values()) / math.prod(present.values())))
    gaps = [missing[word] / max(1, counts[table]) for table, word in (("a", "from"), ("b", "to"))]
    return out | {"psi": psi, "ks": ks, "moved": bool(moved or abs(gaps[0] - gaps[1]) >= _KS)}


def _shares_by_value(connection: duckdb.DuckDBPyConnection, name: str) -> list[tuple[float, float]]:
    found = connection.execute(
        f"""
        WITH x AS (SELECT {name} AS v, count(*) AS n FROM a WHERE {name} IS NOT NULL GROUP BY 1),
             y AS (SELECT {name} AS v, count(*) AS n FROM b WHERE {name} IS NOT NULL GROUP BY 1)
        SELECT coalesce(x.n, 0), coalesce(y.n, 0) FROM x FULL JOIN y USING (v) ORDER BY 1 DESC, 2 DESC, v
        """
    ).fetchall()
    rest = [sum(pair[at] for pair in found[_VALUES:]) for at in (0, 1)]
    return [(float(old), float(new)) for old, new in [*found[:_VALUES], *([rest] if any(rest) else [])]]


def _shares_by_quantile(connection: duckdb.DuckDBPyConnection, name: str, value: str) -> list[tuple[float, float]]:
    steps = [index / _BINS for index in range(1, _BINS)]
    (edges,) = _one(connection, f"SELECT approx_quantile({value}, {steps}) FROM a WHERE {name} IS NOT NULL")
    edges = sorted(set(edges or []))
    if not edges:
        return []
    place = " + ".join(f"({value} > {edge!r})::INTEGER" for edge in edges)
    shares = []
    for table in ("a", "b"):
        counted = dict(
            connection.execute(f"SELECT {place}, count(*) FROM {table} WHERE {name} IS NOT NULL GROUP BY 1").fetchall()
        )
        shares.append([float(counted.get(index, 0)) for index in range(len(edges) + 1)])
    return list(zip(*shares, strict=True))


def _psi(counts: list[tuple[float, float]]) -> float | None:
    totals = [sum(pair[at] for pair in counts) for at in (0, 1)]
    if not all(totals):
        return None
    index = 0.0
    for old, new in counts:
        p, q = max(old / totals[0], _LEAST_SHARE), max(new / totals[1], _LEAST_SHARE)
        index += (q - p) * math.log(q / p)
    return round(index, 6)


def _ks(connection: duckdb.DuckDBPyConnection, name: str, value: str) -> float | None:
    (found,) = _one(
        connection,
        f"""
        WITH every AS (SELECT {value} AS v, 1 AS x, 0 AS y FROM a WHERE {name} IS NOT NULL
                       UNION ALL SELECT {value}, 0, 1 FROM b WHERE {name} IS NOT NULL),
             totals AS (SELECT sum(x) AS n, sum(y) AS m FROM every),
             steps AS (SELECT v, sum(x) AS x, sum(y) AS y FROM every GROUP BY v),
             summed AS (SELECT sum(x) OVER (ORDER BY v) AS x, sum(y) OVER (ORDER BY v) AS y FROM steps)
        SELECT max(abs(summed.x / totals.n - summed.y / totals.m)) FROM summed, totals WHERE totals.n > 0 AND totals.m > 0
        """,
    )
    return None if found is None else round(float(found), 6)
