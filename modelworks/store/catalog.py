"""The catalog: rows that carry a revision, in SQLite (WAL) or Postgres. Small and generic; use cases live above it.

with catalog.write() as tx:
    job = tx.add(Job(project_id=..., kind="train", spec={}))
    job = tx.update(job, status="running")      # Conflict when someone else changed the row since it was read
"""

from __future__ import annotations

import contextlib
import math
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError, ProgrammingError

from modelworks.core.errors import CatalogUnavailable, Conflict, InvalidInput, NotFound
from modelworks.core.types import MOVES, Noun, Page, check_move, new_id
from modelworks.store import schema

N = TypeVar("N", bound=Noun)

_MOVING = {"Job": "job", "Deployment": "deployment", "Replica": "replica"}
# on Postgres: writers take turns, as use cases rely on (whether a name is free, which version is next); readers never wait
_TURN = "SELECT pg_advisory_xact_lock(hashtext('modelworks'), hashtext(current_schema()))"
_ABSENT = ("42P01", "42703", "3F000")  # SQLSTATEs of Postgres: no such table, column, schema
_TOO_LARGE = ("22003",)  # numeric_value_out_of_range


class Catalog:
    """`url`: an SQLAlchemy URL, or a path of an SQLite file. Thread-safe; a transaction belongs to one thread."""

    def __init__(self, url: str | Path, *, busy_timeout: float = 5.0) -> None:
        text = f"sqlite:///{url}" if isinstance(url, Path) or "://" not in str(url) else str(url)
        self.sqlite = text.startswith("sqlite")
        self._busy_timeout = busy_timeout
        options: dict[str, Any] = (
            {"connect_args": {"timeout": busy_timeout}}
            if self.sqlite
            else {"connect_args": {"connect_timeout": max(2, int(busy_timeout))}, "pool_pre_ping": True}
        )
        self.engine = sa.create_engine(text, pool_size=16, max_overflow=48, pool_timeout=busy_timeout, **options)
        self._stamper: sqlite3.Connection | None = None  # writes nothing, so that it sees every write as another's
        self._stamping = threading.Lock()
        if self.sqlite:
            _prepare_sqlite(self.engine)

    def migrate(self) -> None:
        """Create the tables, or bring older ones up to date."""
        from modelworks.store import migrations

        migrations.upgrade(self)

    @contextlib.contextmanager
    def read(self) -> Iterator[Tx]:
        """A consistent view; nothing may be written."""
        with self._transaction("BEGIN", durable=None) as tx:
            yield tx

    @contextlib.contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Tx]:
        """All or nothing. `durable`: on disk before it returns (False for progress, which may be lost in a power cut)."""
        with self._transaction("BEGIN IMMEDIATE", durable=durable) as tx:
            yield tx

    @contextlib.contextmanager
    def _transaction(self, begin: str, durable: bool | None) -> Iterator[Tx]:
        try:
            with self.engine.connect() as connection:
                if self.sqlite:
                    _set_durability(connection, durable)
                    connection.exec_driver_sql(begin)
                else:
                    connection.begin()
                    self._begin_postgres(connection, durable)
                tx = Tx(connection, self.sqlite)
                try:
                    yield tx
                    if durable is not None:
                        tx.flush_topics()
                    _end(connection, "COMMIT", self.sqlite)
                except BaseException:
                    with contextlib.suppress(DBAPIError):
                        _end(connection, "ROLLBACK", self.sqlite)
                    raise
        except (OverflowError, DataError) as error:
            cause = getattr(error, "orig", None) or error  # its own words: SQLAlchemy adds the statement and its values
            if "NUL" in str(cause):
                raise InvalidInput("a text in the request has a NUL character in it; leave it out") from error
            if isinstance(error, OverflowError) or getattr(cause, "sqlstate", None) in _TOO_LARGE:
                raise InvalidInput("a number in the request is larger than 64 bits can hold", code="too_large") from error
            raise InvalidInput(f"the catalog cannot hold a value of the request: {_reason(error)}") from error
        except IntegrityError as error:
            raise Conflict(f"this exists already or was changed by someone else: {_reason(error)}") from error
        except (OperationalError, ProgrammingError, sa.exc.TimeoutError) as error:
            absent = getattr(getattr(error, "orig", None), "sqlstate", None) in _ABSENT
            if isinstance(error, ProgrammingError) and not absent:
                raise
            if absent or "no such" in str(error):  # a table or column: not a state that passes
                raise Conflict(
                    "this home was written by another development version of Modelworks; use that one, or name a new --home",
                    code="schema_mismatch",
                ) from error
            raise CatalogUnavailable(
                "the catalog is busy or away; nothing was changed, try again in a moment",
                retry_after=1.0 + random.random(),
            ) from error

    def _begin_postgres(self, connection: sa.Connection, durable: bool | None) -> None:
        if durable is None:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return
        connection.exec_driver_sql(f"SET LOCAL lock_timeout TO {max(1, int(self._busy_timeout * 1000))}")
        if durable is False:
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
        connection.exec_driver_sql(_TURN)

    def counters(self) -> dict[str, int]:
        """Topic -> how often its nouns have changed. Cheap: gateways poll it."""
        with self.read() as tx:
            return {row.topic: row.counter for row in tx.execute(sa.select(schema.changes))}

    def stamp(self) -> int | None:
        """Another number once anybody has committed a write; costs some microseconds. None where that cannot be told."""
        if not self.sqlite:
            return None
        try:
            with self._stamping:
                if self._stamper is None:
                    file = str(self.engine.url.database)
                    self._stamper = sqlite3.connect(file, timeout=0.0, isolation_level=None, check_same_thread=False)
                return int(self._stamper.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:  # whoever looks then will hear why
            return None

    def close(self) -> None:
        with self._stamping:
            if self._stamper is not None:
                self._stamper.close()
                self._stamper = None
        self.engine.dispose()


class Watch:
    """For loops that look at the catalog again and again: whether it is worth it, which an idle one is asked in vain.

    `stirred` is true when something was written since what was `seen`, and each `seconds` in any case.
    """

    def __init__(self, catalog: Catalog, seconds: float = 1.0) -> None:
        self._catalog, self._seconds = catalog, seconds
        self._seen: int | None = None
        self._now: int | None = None
        self._at = -math.inf

    def stirred(self) -> bool:
        self._now = self._catalog.stamp()
        return self._now is None or self._now != self._seen or time.monotonic() - self._at >= self._seconds

    def seen(self) -> None:
        """All that was written before the last `stirred` is known; not to be called when the look failed."""
        self._seen, self._at = self._now, time.monotonic()


class Tx:
    """One transaction. Lists are in order of age unless asked otherwise."""

    def __init__(self, connection: sa.Connection, sqlite: bool) -> None:
        self._connection = connection
        self._sqlite = sqlite
        self._topics: set[str] = set()

    def execute(self, statement: Any) -> Any:
        return self._connection.execute(statement)

    def now(self) -> float:
        """Seconds since the epoch by the catalog's clock, which all processes share."""
        if self._sqlite:
            return time.time()  # one machine, one clock
        return float(self._connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def add(self, noun: N) -> N:
        """Insert with a fresh id (unless it has one), revision 1 and the time; returns the noun as kept."""
        noun = noun.model_copy(
            update={
                "id": noun.id or new_id(type(noun).PREFIX),
                "revision": 1,
                "created_at": noun.created_at or self.now(),
            }
        )
        self.execute(sa.insert(schema.TABLES[type(noun)]).values(**_row(noun)))
        self._touch(type(noun))
        return noun

    def get(self, cls: type[N], id: str, *, project_id: str | None = None) -> N:
        """The noun `id`; NotFound when there is none, or when it belongs to another project than `project_id`."""
        noun = self.find(cls, id=id) if project_id is None else self.find(cls, id=id, project_id=project_id)
        if noun is None:
            raise NotFound(
                f"there is no {_word(cls)} {id!r} in this project", code=f"{_word(cls).replace(' ', '_')}_not_found"
            )
        return noun

    def find(self, cls: type[N], *clauses: Any, **equals: Any) -> N | None:
        rows = self.list(cls, *clauses, limit=1, **equals)
        return rows[0] if rows else None

    def list(
        self,
        cls: type[N],
        *clauses: Any,
        limit: int | None = None,
        after: str | None = None,
        newest_first: bool = False,
        order_by: Any = None,
        **equals: Any,
    ) -> list[N]:
        """Nouns whose columns equal `equals` (a list value means any of it) and meet the SQLAlchemy `clauses`.

        `after`: only those that follow this id in the order; ids sort by age.
        """
        table = schema.TABLES[cls]
        query = sa.select(table)
        for name, value in equals.items():
            column = table.c[name]
            query = query.where(
                column.in_(value) if isinstance(value, (list, tuple, set, frozenset)) else column == value
            )
        if clauses:
            query = query.where(*clauses)
        if after is not None:
            query = query.where(table.c.id < after if newest_first else table.c.id > after)
        query = query.order_by(order_by if order_by is not None else table.c.id.desc() if newest_first else table.c.id)
        if limit is not None:
            query = query.limit(limit)
        return [cls.model_validate(dict(row)) for row in self.execute(query).mappings()]

    def page(self, cls: type[N], *clauses: Any, limit: int = 20, after: str | None = None, **equals: Any) -> Page[N]:
        """Newest first, at most `limit`; `after` is the last id of the page before."""
        found = self.list(cls, *clauses, limit=limit + 1, after=after, newest_first=True, **equals)
        return Page(found[:limit], len(found) > limit)

    def count(self, cls: type[Noun], *clauses: Any, **equals: Any) -> int:
        table = schema.TABLES[cls]
        query = sa.select(sa.func.count()).select_from(table)
        query = query.where(*clauses, *(table.c[name] == value for name, value in equals.items()))
        return int(self.execute(query).scalar_one())

    def counts(self, cls: type[Noun], *columns: str, **equals: Any) -> dict[tuple[Any, ...], int]:
        """How many there are with each combination of values of `columns`; combinations without any are left out."""
        table = schema.TABLES[cls]
        chosen = [table.c[name] for name in columns]
        query = sa.select(*chosen, sa.func.count()).group_by(*chosen)
        query = query.where(*(table.c[name] == value for name, value in equals.items()))
        return {tuple(row[:-1]): int(row[-1]) for row in self.execute(query)}

    def update(self, noun: N, **changes: Any) -> N:
        """Write `changes` if the row still has the noun's revision, else Conflict. A `status` must be a legal move."""
        kind = _MOVING.get(type(noun).__name__)
        if kind and "status" in changes:
            check_move(kind, noun.status, changes["status"])  # type: ignore[attr-defined]
        changed = noun.model_copy(update={**changes, "revision": noun.revision + 1})
        table = schema.TABLES[type(noun)]
        row = _row(changed)
        statement = (
            sa.update(table)
            .where(table.c.id == noun.id, table.c.revision == noun.revision)
            .values({name: row[name] for name in [*changes, "revision"]})
        )
        if self.execute(statement).rowcount != 1:
            raise Conflict(
                f"the {_word(type(noun))} {noun.id} was changed meanwhile; read it again", code="stale_revision"
            )
        self._touch(type(noun))
        return changed

    def delete(self, noun: Noun) -> None:
        table = schema.TABLES[type(noun)]
        self.execute(sa.delete(table).where(table.c.id == noun.id))
        self._touch(type(noun))

    def delete_where(self, cls: type[Noun], *clauses: Any) -> int:
        table = schema.TABLES[cls]
        self._touch(cls)
        return int(self.execute(sa.delete(table).where(*clauses)).rowcount)

    def table(self, cls: type[Noun]) -> sa.Table:
        return schema.TABLES[cls]

    def _touch(self, cls: type[Noun]) -> None:
        if topic := schema.TOPICS.get(cls):
            self._topics.add(topic)

    def counter(self, topic: str) -> int:
        """How often the nouns of `topic` have changed, as this transaction sees it."""
        changes = schema.changes
        found = self.execute(sa.select(changes.c.counter).where(changes.c.topic == topic)).scalar_one_or_none()
        return int(found or 0)

    def flush_topics(self) -> None:
        """Raise the counters of what this transaction changed; called at commit."""
        for topic in sorted(self._topics):
            done = self.execute(
                sa.update(schema.changes)
                .where(schema.changes.c.topic == topic)
                .values(counter=schema.changes.c.counter + 1)
            )
            if done.rowcount == 0:
                self.execute(sa.insert(schema.changes).values(topic=topic, counter=1))


def _row(noun: Noun) -> dict[str, Any]:
    plain = noun.model_dump(mode="python")
    table = schema.TABLES[type(noun)]
    dumped: dict[str, Any] | None = None
    for column in table.columns:
        if isinstance(column.type, sa.JSON) and isinstance(getattr(noun, column.name), (BaseModel, list, dict)):
            dumped = dumped or noun.model_dump(mode="json")
            plain[column.name] = dumped[column.name]
    return plain


def _word(cls: type[Noun]) -> str:
    return {"ModelVersion": "model version", "JobEvent": "job event"}.get(cls.__name__, cls.__name__.lower())


def _reason(error: DBAPIError) -> str:
    return str(error.orig).removeprefix("UNIQUE constraint failed: ") if error.orig else "constraint failed"


def _end(connection: sa.Connection, word: str, sqlite: bool) -> None:
    if sqlite:
        connection.exec_driver_sql(word)
    elif word == "COMMIT":
        connection.commit()
    else:
        connection.rollback()


def _set_durability(connection: sa.Connection, durable: bool | None) -> None:
    """FULL: fsync at each commit; NORMAL: at checkpoints. A reader keeps what the connection has."""
    want = "NORMAL" if durable is False else "FULL"
    if durable is not None and connection.info.get("synchronous") != want:
        connection.exec_driver_sql(f"PRAGMA synchronous={want}")
        connection.info["synchronous"] = want


def _prepare_sqlite(engine: sa.Engine) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where this module says so
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


assert set(_MOVING.values()) == set(MOVES)
