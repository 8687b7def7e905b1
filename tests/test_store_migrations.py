"""A catalog that was migrated equals one that was created whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from modelworks.core.errors import Conflict
from modelworks.core.types import Project
from modelworks.store import migrations
from modelworks.store.catalog import Catalog
from modelworks.store.schema import metadata


def tables(path: Path) -> dict[str, str]:
    """The text of every CREATE statement, but for Alembic's own table."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: " ".join(sql.split()) for name, sql in rows if name != "alembic_version"}


@pytest.fixture
def created(tmp_path):
    catalog = Catalog(tmp_path / "created.sqlite")
    catalog.migrate()
    yield catalog
    catalog.close()


@pytest.fixture
def migrated(tmp_path):
    catalog = Catalog(tmp_path / "migrated.sqlite")
    migrations._alembic(catalog)
    yield catalog
    catalog.close()


def test_created_and_migrated_catalogs_are_the_same(tmp_path, created, migrated):
    assert len(tables(tmp_path / "created.sqlite")) > 17
    assert tables(tmp_path / "created.sqlite") == tables(tmp_path / "migrated.sqlite")


def test_alembic_finds_nothing_to_do(migrated):
    with migrated.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_head_is_the_newest_step():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == migrations.HEAD


def test_both_ways_stamp_the_same_version(created, migrated):
    for catalog in (created, migrated):
        with catalog.read() as tx:
            assert tx.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == migrations.HEAD


def test_migrating_again_keeps_the_rows(created):
    with created.write() as tx:
        project = tx.add(Project(name="kept"))
    created.migrate()
    with created.read() as tx:
        assert tx.get(Project, project.id) == project


def test_a_home_from_a_newer_version_is_refused(created):
    with created.write() as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Conflict, match="newer Modelworks"):
        created.migrate()


def test_a_step_that_fails_leaves_nothing_behind(tmp_path):
    catalog = Catalog(tmp_path / "half.sqlite")
    with catalog.write() as tx:
        tx.execute(sa.text("CREATE TABLE users (id TEXT)"))  # the last table of the step: the others come before it
    with pytest.raises(sa.exc.OperationalError, match="users"):
        migrations._alembic(catalog)
    catalog.close()
    assert set(tables(tmp_path / "half.sqlite")) == {"users"}
