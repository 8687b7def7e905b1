"""Schema changes, by Alembic. A fresh catalog is created whole and stamped; an older one is upgraded step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from modelworks.core.errors import Conflict
from modelworks.store.schema import metadata

if TYPE_CHECKING:
    from modelworks.store.catalog import Catalog

HEAD = "0001"
_version = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))


def upgrade(catalog: Catalog) -> None:
    """Bring the catalog to HEAD. Alembic is imported only when there is something to do."""
    with catalog.write() as tx:
        connection = tx._connection
        known = sa.inspect(connection).has_table("alembic_version")
        current = tx.execute(sa.select(_version.c.version_num)).scalar_one_or_none() if known else None
        if current is None:
            metadata.create_all(connection)
            _version.metadata.create_all(connection)
            tx.execute(sa.insert(_version).values(version_num=HEAD))
    if current not in (None, HEAD):
        _alembic(catalog)


def _alembic(catalog: Catalog) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    with catalog.engine.connect() as connection:
        config.attributes["connection"] = connection
        try:
            if catalog.sqlite:  # all steps or none, and one process at a time; Postgres does so by itself
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            command.upgrade(config, "head")
            if catalog.sqlite:
                connection.exec_driver_sql("COMMIT")
        except CommandError as error:
            raise Conflict(
                f"this home was written by a newer Modelworks ({error}); upgrade with: pip install -U modelworks"
            ) from error
