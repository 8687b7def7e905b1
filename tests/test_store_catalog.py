"""Transactions of the catalog: all or nothing, revisions, durability, what happens when it is busy, paging."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from modelworks.core.errors import CatalogUnavailable, Conflict, InvalidInput, NotFound
from modelworks.core.types import Job, Key, Project, User, new_id
from modelworks.store import migrations
from modelworks.store.catalog import Catalog, Watch
from modelworks.store.schema import metadata


@pytest.fixture(params=["sqlite", "postgres"])
def catalog(request, tmp_path):
    """One of each kind: both must behave alike."""
    url = tmp_path / "catalog.sqlite"
    if request.param == "postgres":
        url = in_schema(request.getfixturevalue("postgres_url"))
    catalog = Catalog(url, busy_timeout=0.1)
    catalog.migrate()
    yield catalog
    catalog.close()


def in_schema(url):
    """A schema of its own, which is as good as a database and made sooner."""
    name = new_id("test")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(name))
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"


def second(catalog, **options):
    """As another process would open it."""
    return Catalog(catalog.engine.url.render_as_string(hide_password=False), **options)


def names(catalog):
    with catalog.read() as tx:
        return [project.name for project in tx.list(Project)]


def test_a_watch_is_stirred_by_what_anyone_writes(catalog):
    watch, other = Watch(catalog, 3600.0), second(catalog)
    assert watch.stirred()
    assert watch.stirred()  # until the look has succeeded
    watch.seen()
    assert watch.stirred() is not catalog.sqlite  # Postgres cannot tell: always
    for number, writer in enumerate((catalog, other)):
        with writer.write(durable=False) as tx:
            tx.add(Project(name=f"p{number}"))
        assert watch.stirred()
        watch.seen()
    assert Watch(catalog, 0.0).stirred()
    other.close()


def test_an_error_undoes_the_whole_transaction(catalog):
    def fail() -> None:
        with catalog.write() as tx:
            tx.add(Project(name="a"))
            tx.add(Project(name="b"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(catalog) == []
    with catalog.write() as tx:  # the connection is usable again
        tx.add(Project(name="c"))
    assert names(catalog) == ["c"]


def test_what_is_written_is_read_back_equal(catalog):
    with catalog.write() as tx:
        key = tx.add(Key(project_id="p", name="k", role="viewer", digest="d", hint="hint", scopes=["data:read"]))
    with catalog.read() as tx:
        assert tx.get(Key, key.id) == key
    assert key.revision == 1
    assert key.id.startswith("key_")


def test_a_stale_revision_is_a_conflict_and_changes_nothing(catalog):
    with catalog.write() as tx:
        read = tx.add(User(name="ada"))
    with catalog.write() as tx:
        changed = tx.update(read, name="grace")
    with pytest.raises(Conflict, match="read it again") as caught, catalog.write() as tx:
        tx.update(read, name="lost")
    assert caught.value.code == "stale_revision"
    with catalog.read() as tx:
        assert tx.get(User, read.id) == changed
    assert (changed.name, changed.revision) == ("grace", 2)


def test_a_second_of_the_same_name_is_a_conflict(catalog):
    with catalog.write() as tx:
        tx.add(Project(name="a"))

    def again() -> None:
        with catalog.write() as tx:
            tx.add(Project(name="b"))
            tx.add(Project(name="a"))

    with pytest.raises(Conflict):
        again()
    assert names(catalog) == ["a"]


def test_an_illegal_move_is_a_conflict(catalog):
    with catalog.write() as tx:
        job = tx.add(Job(project_id="p", kind="train", spec={}))
    with pytest.raises(Conflict), catalog.write() as tx:
        tx.update(job, status="succeeded")  # it never ran


def test_another_projects_noun_is_not_found(catalog):
    with catalog.write() as tx:
        job = tx.add(Job(project_id="mine", kind="train", spec={}))
    with catalog.read() as tx, pytest.raises(NotFound):
        tx.get(Job, job.id, project_id="theirs")


def test_a_busy_catalog_is_unavailable_and_recovers(catalog):
    other = second(catalog)
    with other.write():
        with pytest.raises(CatalogUnavailable) as caught, catalog.write() as tx:
            tx.add(Project(name="never"))
        assert caught.value.retry_after > 0
        assert names(catalog) == []  # readers go on
    other.close()
    with catalog.write() as tx:
        tx.add(Project(name="now"))
    assert names(catalog) == ["now"]


def test_a_reader_sees_one_moment(catalog):
    with catalog.write() as tx:
        tx.add(Project(name="a"))
    with catalog.read() as before:
        assert before.count(Project) == 1
        with catalog.write() as tx:
            tx.add(Project(name="b"))
        assert before.count(Project) == 1
    assert names(catalog) == ["a", "b"]


def test_acknowledged_changes_are_synced_and_progress_is_not(catalog):
    asked, no, yes = ("PRAGMA synchronous", 1, 2) if catalog.sqlite else ("SHOW synchronous_commit", "off", "on")

    def synchronous(tx):
        return tx.execute(sa.text(asked)).scalar_one()

    with catalog.write(durable=False) as tx:
        assert synchronous(tx) == no
    with catalog.write() as tx:
        assert synchronous(tx) == yes  # also on a connection that was used for progress before
    with catalog.write(durable=False) as tx:
        assert synchronous(tx) == no


def test_counters_rise_with_their_topic_only(catalog):
    before = catalog.counters()
    with catalog.write() as tx:
        tx.add(Project(name="a"))
        tx.add(User(name="ada"))
    after = catalog.counters()
    assert after["access"] == before.get("access", 0) + 1
    assert after.get("routing") == before.get("routing")
    with catalog.read() as tx:
        assert tx.counter("access") == after["access"]
        assert tx.counter("no such topic") == 0

    def fail() -> None:
        with catalog.write() as tx:
            tx.add(User(name="grace"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert catalog.counters() == after


def test_pages_are_newest_first_and_complete(catalog):
    with catalog.write() as tx:
        for number in range(7):
            tx.add(Project(id=f"proj_{number}", name=str(number)))
        tx.add(User(name="ada"))
    seen, after, more = [], None, True
    while more:
        with catalog.read() as tx:
            page = tx.page(Project, limit=3, after=after)
        assert len(page.items) <= 3
        seen += [project.name for project in page.items]
        after, more = page.items[-1].id, page.has_more
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]
    with catalog.read() as tx:
        assert tx.page(Project, limit=7).has_more is False


def test_writers_in_threads_lose_nothing(catalog):
    catalog = second(catalog)
    with catalog.write() as tx:
        tx.add(User(id="user_1", name="0"))

    def count_up() -> None:
        for _ in range(10):
            with catalog.write(durable=False) as tx:
                user = tx.get(User, "user_1")
                tx.update(user, name=str(int(user.name) + 1))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.read() as tx:
        assert tx.get(User, "user_1").name == "40"
    catalog.close()


def test_what_a_database_cannot_hold_is_refused(catalog):
    with pytest.raises(InvalidInput, match="larger than 64 bits"), catalog.write() as tx:
        tx.add(Job(project_id="p", kind="train", spec={}, attempt=2**63))
    if not catalog.sqlite:  # SQLite keeps it as it is
        with pytest.raises(InvalidInput, match="NUL"), catalog.write() as tx:
            tx.add(Project(name="a\x00b"))
    assert names(catalog) == []


def test_tables_of_another_version_are_told(catalog):
    with catalog.write() as tx:
        tx.execute(sa.text("ALTER TABLE projects DROP COLUMN created_at"))
    with pytest.raises(Conflict, match="another development version"):
        names(catalog)


def test_an_older_catalog_is_brought_up_to_date(request):
    """By Alembic's steps on Postgres, too (for SQLite see test_store_migrations)."""
    catalog = Catalog(in_schema(request.getfixturevalue("postgres_url")))
    migrations._alembic(catalog)
    with catalog.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    catalog.migrate()
    catalog.close()


def test_values_stay_data(catalog):
    hostile = "'; DROP TABLE projects; --"
    with catalog.write() as tx:
        tx.add(Project(name=hostile))
    with catalog.read() as tx:
        assert tx.find(Project, name=hostile).name == hostile
        assert tx.find(Project, name="' OR '1'='1") is None
        assert tx.page(Project, after="' OR 1=1 --").items == []
