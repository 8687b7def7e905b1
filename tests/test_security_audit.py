"""The audit row: part of the change's transaction, bounded, and without secrets."""

from __future__ import annotations

import json

import pytest

from modelworks.core.types import AuditRecord, Caller, Principal
from modelworks.security import audit
from modelworks.security.identity import new_key
from modelworks.store.catalog import Catalog

CALLER = Caller(Principal("key_1", "laptop", "proj_1", "admin", frozenset()), request_id="req_1")


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog.migrate()
    yield catalog
    catalog.close()


def write(catalog, caller=CALLER, action="deployments.put", object="iris", **detail) -> AuditRecord:
    with catalog.write() as tx:
        made = audit.record(tx, caller, action, object, **detail)
    with catalog.read() as tx:
        kept = tx.get(AuditRecord, made.id)
    assert kept == made
    return kept


def test_it_says_who_what_where_and_in_which_request(catalog):
    record = write(catalog, revision=3, model_version="iris:1")
    assert (record.principal, record.project_id, record.request_id) == ("key_1", "proj_1", "req_1")
    assert (record.action, record.object) == ("deployments.put", "iris")
    assert record.detail == {"key_name": "laptop", "revision": 3, "model_version": "iris:1"}


def test_it_goes_with_its_transaction(catalog):
    def fail() -> None:
        with catalog.write() as tx:
            audit.record(tx, CALLER, "deployments.put", "iris")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with catalog.read() as tx:
        assert tx.count(AuditRecord) == 0


def test_keys_are_blotted_out_wherever_they_stand(catalog):
    key = new_key()
    caller = Caller(Principal("key_1", key, "proj_1", "admin", frozenset()), request_id=key)
    record = write(catalog, caller, object=f"x {key}", plain=key, nested={"list": [f"a {key} b"], key: 1})
    assert key not in json.dumps(record.public())
    assert record.detail["nested"]["list"] == ["a mw_*** b"]


def test_it_is_bounded(catalog):
    deep: dict = {}
    for _ in range(100):
        deep = {"deeper": deep, "text": "x" * 10_000}
    record = write(
        catalog, object="o" * 100_000, long="x" * 100_000, many=list(range(100_000)), deep=deep, bad=float("nan")
    )
    assert len(json.dumps(record.public(), allow_nan=False)) < 10_000
