"""How the data room words its refusals: each says the row, the line of the file where there is one, and the column."""

from __future__ import annotations

from modelworks.core.errors import InvalidInput

MAX_COLUMNS = 10_000
MAX_NAME = 1000  # characters of a column name
MAX_FIELD = 1 << 20  # bytes of one value
MAX_ROW = 2 << 20  # bytes of one row or line of a text file
SHOWN = 80  # characters of a value that a message quotes


def shown(value: object) -> str:
    """A value quoted in a message, bounded."""
    text = value if isinstance(value, str) else str(value)
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")


def fault(
    what: str,
    *,
    row: int,
    line: int | None = None,
    column: str | None = None,
    field: int | None = None,
    code: str = "bad_data",
) -> InvalidInput:
    """An error at a data row (from 1; 0: the header), its line in the file, and a column by name or number (from 1)."""
    where = "the header row" if row == 0 else f"row {row}"
    if line is not None:
        where += f" (line {line})"
    if column is not None:
        where += f", column {column[:SHOWN]!r}"
    elif field is not None:
        where += f", column {field}"
    detail = {"row": row, "line": line, "column": column if column is not None else field}
    return InvalidInput(f"{where}: {what}", code=code, param="file", detail=detail)


def check_names(names: list[str], *, line: int | None, advice: str) -> None:
    """Raise InvalidInput unless there are 1 to MAX_COLUMNS names, none empty, overlong or given twice."""
    if not names:
        raise InvalidInput("the table has no columns; give it at least one", code="bad_data", param="file")
    if len(names) > MAX_COLUMNS:
        raise fault(f"{len(names)} columns, more than {MAX_COLUMNS}", row=0, line=line, field=MAX_COLUMNS + 1)
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise fault(f"the column has no name; {advice}", row=0, line=line, field=number, code="bad_header")
        if len(name) > MAX_NAME or "\x00" in name:
            what = f"a column name has at most {MAX_NAME} characters and no NUL"
            raise fault(what, row=0, line=line, field=number, code="bad_header")
        if name in seen:
            what = f"the name {shown(name)} was already given to column {seen[name]}; {advice}"
            raise fault(what, row=0, line=line, field=number, code="bad_header")
        seen[name] = number
