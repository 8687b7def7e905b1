"""The plan for one deployment: pure, so every case is a row in, a plan out."""

from modelworks.control import scaling
from modelworks.control.scaling import Failures
from modelworks.core.deployment import Replicas
from modelworks.core.types import Deployment, Replica, Signature


def deployment(**changes):
    fields = {
        "id": "dep_1",
        "project_id": "proj_1",
        "name": "iris",
        "spec": {"model": "iris:1", "replicas": {"min": 2}},
        "spec_revision": 2,
        "model_version": "iris:1",
        "model_version_id": "mv_1",
        "digest": "0" * 64,
        "task": "tabular-classification",
        "signature": Signature(inputs=[], outputs=[]),
    }
    return Deployment(**{**fields, **changes})


def replica(id, revision=2, status="ready"):
    return Replica(
        id=id, project_id="proj_1", deployment_id="dep_1", spec_revision=revision, model_version="iris:1", status=status
    )


def test_a_new_deployment_starts_all_it_wants_at_once():
    plan = scaling.plan(deployment(), [], Failures(), now=0)
    assert (plan.status, plan.start, plan.drain) == ("creating", 2, [])


def test_ready_when_enough_are_ready_and_the_old_drain_only_then():
    old = [replica("a", 1), replica("b", 1)]
    half = scaling.plan(
        deployment(status="updating"), [*old, replica("c"), replica("d", status="starting")], Failures(), 0
    )
    assert (half.status, half.start, half.drain) == ("updating", 0, [])
    done = scaling.plan(deployment(status="updating"), [*old, replica("c"), replica("d")], Failures(), 0)
    assert (done.status, done.drain) == ("ready", old)


def test_a_revision_that_cannot_start_leaves_the_old_one_serving():
    observed = [replica("a", 1), replica("b", 1)]
    plan = scaling.plan(deployment(status="updating"), observed, Failures(crashes=1, fatal="parity differs"), 0)
    assert plan.status == "failed"
    assert plan.start == 0
    assert plan.drain == []
    assert "parity differs" in plan.message
    assert "revision 1 goes on serving" in plan.message
    assert scaling.serving(deployment(), observed) == observed


def test_crashes_wait_ever_longer_before_the_next_start():
    failures = Failures(crashes=3, last=100.0)
    assert scaling.plan(deployment(), [], failures, now=100.9).start == 0
    assert scaling.plan(deployment(), [], failures, now=101.0).start == 2
    many = Failures(crashes=50, last=100.0)
    assert scaling.retry_at(many) == 130.0
    assert scaling.plan(deployment(), [], many, now=101).status == "failed"


def test_a_lost_replica_of_a_ready_deployment_degrades_it_and_is_replaced():
    plan = scaling.plan(deployment(status="ready"), [replica("a")], Failures(), 0)
    assert (plan.status, plan.start) == ("degraded", 1)


def test_surplus_drains_starting_ones_first():
    rows = [replica("a"), replica("b"), replica("c", status="starting")]
    assert [row.id for row in scaling.plan(deployment(status="ready"), rows, Failures(), 0).drain] == ["c"]


def test_deleting_drains_all_and_is_removed_when_nothing_is_left():
    gone = deployment(status="deleting")
    draining = replica("a", status="draining")
    assert scaling.plan(gone, [replica("b"), draining], Failures(), 0).drain == [replica("b")]
    assert not scaling.plan(gone, [draining], Failures(), 0).remove
    assert scaling.plan(gone, [], Failures(), 0).remove


def test_calls_go_to_the_old_revision_until_enough_new_ones_are_ready():
    old, new = replica("a", 1), replica("c")
    assert scaling.serving(deployment(), [old, new]) == [old]
    assert scaling.serving(deployment(), [old, new, replica("d")]) == [new, replica("d")]
    assert scaling.serving(deployment(), [new]) == [new]
    assert scaling.serving(deployment(), []) == []


def test_the_revision_that_was_ready_is_restored_when_it_died_and_the_new_one_cannot_start():
    broken = deployment(status="failed", serving_revision=1)
    plan = scaling.plan(broken, [], Failures(crashes=7, last=99.0, reason="out of memory"), 100.0)
    assert (plan.restore, plan.start) == (2, 0)
    assert "out of memory" in plan.message
    assert scaling.plan(broken, [], Failures(fatal="parity differs"), 100.0).restore == 2
    assert scaling.plan(broken, [replica("a", 1)], Failures(fatal="parity differs"), 100.0).restore == 0
    crashing = Failures(crashes=4, last=99.0)
    assert scaling.plan(broken, [], Failures(fatal="no"), 100.0, crashing).restore == 0
    assert scaling.plan(deployment(serving_revision=2), [], Failures(), 0).restore == 0


SCALED = Replicas(min=1, max=4, target=8, scale_down_s=60)


def test_more_calls_under_way_ask_for_more_replicas_at_once():
    assert scaling.follow(SCALED, 1, [(0.0, 30)], 0.0) == 4
    assert scaling.follow(SCALED, 1, [(0.0, 9)], 0.0) == 2
    assert scaling.follow(SCALED, 1, [(0.0, 8)], 0.0) == 1
    assert scaling.follow(SCALED, 1, [(0.0, 500)], 0.0) == 4, "never beyond max"
    assert scaling.follow(SCALED, 1, [(0.0, 0), (1.0, 0), (2.0, 24)], 2.0) == 1, "one burst is averaged out"


def test_fewer_replicas_only_after_fewer_have_been_enough_for_long():
    calls = [(float(second), 30 if second < 10 else 3) for second in range(0, 100)]
    kept = [scaling.follow(SCALED, 4, calls[max(0, now - 61) : now + 1], float(now)) for now in (20, 59, 68)]
    assert kept == [4, 4, 4]
    assert scaling.follow(SCALED, 4, calls[10:72], 71.0) == 1
    middle = [(float(second), 12) for second in range(62)]
    assert scaling.follow(SCALED, 4, middle, 61.0) == 2


def test_without_a_max_the_number_is_fixed():
    assert scaling.follow(Replicas(min=2), 2, [(0.0, 1000)], 0.0) == 2
    assert scaling.follow(Replicas(min=2, max=2), 2, [(0.0, 1000)], 0.0) == 2


def test_scaling_starts_and_drains_while_the_deployment_stays_ready():
    ready = deployment(status="ready")
    up = scaling.plan(ready, [replica("a"), replica("b")], Failures(), 0, wanted=4)
    assert (up.status, up.start, up.drain) == ("ready", 2, [])
    three = [replica("a"), replica("b"), replica("c")]
    down = scaling.plan(ready, three, Failures(), 0, wanted=2)
    assert (down.status, down.start, len(down.drain)) == ("ready", 0, 1)
    held = scaling.plan(ready, [replica("a"), replica("b")], Failures(crashes=4, last=0.0), 0.5, wanted=4)
    assert (held.status, held.start) == ("ready", 0), "crashes delay further starts"


def test_a_new_revision_takes_over_with_as_many_as_the_load_asks_for():
    old = [replica(id, 1) for id in ("a", "b", "c")]
    some = [replica("d"), replica("e")]
    waiting = scaling.plan(deployment(status="updating"), [*old, *some], Failures(), 0, wanted=3)
    assert (waiting.status, waiting.start, waiting.drain) == ("updating", 1, [])
    assert scaling.serving(deployment(), [*old, *some]) == old
    assert (
        scaling.plan(deployment(status="updating"), [*old, *some, replica("f")], Failures(), 0, wanted=3).drain == old
    )
    assert scaling.serving(deployment(), [*old, *some, replica("f")]) == [*some, replica("f")]
