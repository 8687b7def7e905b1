"""The queue with a clock turned by hand: leases, tokens, retries, cancel and pause, many claimants."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import Conflict, InvalidInput, LeaseLost
from modelworks.core.types import Artifact, Checkpoint, Job, JobEvent, JobKind
from modelworks.jobs import queue as q
from modelworks.jobs.collection import prune_logs
from modelworks.jobs.queue import Queue, backoff, held, still_running
from modelworks.ml.base import Cancelled
from modelworks.store.catalog import Catalog, Tx

LEASE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Tx, "now", lambda self: clock.now)
    return clock


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog.migrate()
    yield catalog
    catalog.close()


@pytest.fixture
def queue(catalog: Catalog, clock: Clock) -> Queue:
    return Queue(catalog)


def put(catalog: Catalog, project: str = "proj_a", kind: JobKind = "train", **more: Any) -> Job:
    with catalog.write() as tx:
        return Queue(catalog).enqueue(tx, Job(project_id=project, kind=kind, spec={}, **more))


def read(catalog: Catalog, job: Job) -> Job:
    with catalog.read() as tx:
        return tx.get(Job, job.id)


def claimed(queue: Queue, owner: str = "host:/home#w1") -> Job:
    job = queue.claim(owner, LEASE)
    assert job is not None
    return job


def finish(catalog: Catalog, queue: Queue, job: Job, **changes: Any) -> Job:
    with catalog.write() as tx:
        return queue.finish(tx, still_running(tx, job.id, job.token), **changes)


def commit_with_artifact(catalog: Catalog, queue: Queue, job: Job) -> None:
    with catalog.write() as tx:
        tx.add(Artifact(project_id="proj_a", digest="0" * 64, kind="model", size=1, owner_id="mv_1"))
        queue.finish(tx, still_running(tx, job.id, job.token))


def test_a_job_is_claimed_once_and_each_claim_raises_the_token(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    job = put(catalog)
    assert queue.idle_for() == 0
    first = claimed(queue)
    assert (first.id, first.status, first.token, first.attempt) == (job.id, "running", 1, 1)
    assert first.lease_expires_at == clock.now + LEASE
    assert queue.claim("other", LEASE) is None
    assert queue.idle_for() == LEASE
    queue.release(first.id, first.token)
    assert claimed(queue).token == 2


def test_the_oldest_job_of_the_project_with_the_fewest_running_comes_first(catalog: Catalog, queue: Queue) -> None:
    for id, project in (("job_1", "proj_a"), ("job_2", "proj_a"), ("job_3", "proj_b")):
        put(catalog, project, id=id)
    assert [claimed(queue).id for _ in range(3)] == ["job_1", "job_3", "job_2"]


def claimed_kinds(queue: Queue, slots: int, **more: Any) -> list[str]:
    """Of all that can be claimed now, one after the other."""
    found = []
    while job := queue.claim("host:/home#w1", LEASE, slots=slots, **more):
        found.append(job.kind)
    return found


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ingest", "edit", "diff"])
def test_an_upload_does_not_wait_for_trainings(catalog: Catalog, queue: Queue, slots: int, kind: JobKind) -> None:
    for _ in range(slots + 2):
        put(catalog)
    assert claimed_kinds(queue, slots) == ["train"] * slots
    put(catalog, kind=kind)
    put(catalog, kind=kind)
    assert claimed_kinds(queue, slots) == [kind], "and no more than one beside the slots"


@pytest.mark.parametrize(("slots", "uploads"), [(1, 1), (2, 2), (3, 3)])
def test_uploads_leave_a_slot_to_the_others(catalog: Catalog, queue: Queue, slots: int, uploads: int) -> None:
    for _ in range(10):
        put(catalog, kind="ingest")
    assert claimed_kinds(queue, slots) == ["ingest"] * uploads
    put(catalog)
    put(catalog)
    assert claimed_kinds(queue, slots) == ["train"], "though uploads wait for longer"


def test_a_slot_that_comes_free_is_given_to_a_training_before_a_second_upload(catalog: Catalog, queue: Queue) -> None:
    uploads = [put(catalog, kind="ingest") for _ in range(4)]
    assert claimed_kinds(queue, 2) == ["ingest", "ingest"]
    trainings = [put(catalog) for _ in range(2)]
    assert claimed_kinds(queue, 2) == ["train"]
    finish(catalog, queue, read(catalog, uploads[0]))
    assert claimed_kinds(queue, 2) == ["train"]
    finish(catalog, queue, read(catalog, uploads[1]))
    assert claimed_kinds(queue, 2) == ["ingest"]
    finish(catalog, queue, read(catalog, trainings[0]))
    assert claimed_kinds(queue, 2) == ["ingest"]


def test_the_only_lane_of_uploads_alternates_between_projects(catalog: Catalog, queue: Queue) -> None:
    for id, project in (("job_1", "proj_a"), ("job_2", "proj_a"), ("job_3", "proj_a"), ("job_4", "proj_b")):
        put(catalog, project, "ingest", id=id)
    order = []
    for _ in range(4):
        order.append(claimed(queue))
        finish(catalog, queue, order[-1])
    assert [job.id for job in order] == ["job_1", "job_4", "job_2", "job_3"]


def test_an_upload_whose_process_lingers_keeps_its_place(catalog: Catalog, queue: Queue) -> None:
    for _ in range(2):
        put(catalog)
        put(catalog, kind="ingest")
    assert claimed_kinds(queue, 1, lingering={"job_0": "ingest"}) == ["train"]
    assert claimed_kinds(queue, 1) == ["ingest"]


def test_a_job_that_waited_for_its_parts_has_its_slot_again_beside_an_upload(catalog: Catalog, queue: Queue) -> None:
    put(catalog, slot="later")
    parent = claimed(queue)
    assert queue.let_go(parent.id, parent.token, 1)
    put(catalog, kind="ingest")
    assert claimed_kinds(queue, 1) == ["ingest"]
    assert queue.take(parent.id, parent.token, 1)


def test_a_lease_lasts_as_long_as_its_heart_beats(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    put(catalog)
    job = claimed(queue)
    for _ in range(5):
        clock.now += LEASE * 0.8
        assert queue.heartbeat({job.id: job.token}, LEASE) == {}
        assert queue.reclaim() == 0
    clock.now += LEASE + 1
    assert queue.idle_for() == 0
    assert queue.reclaim() == 1
    again = read(catalog, job)
    assert (again.status, again.idle_deaths) == ("queued", 1)
    assert queue.claim("w2", LEASE) is None  # backs off first
    clock.now += backoff(1)
    assert claimed(queue, "w2").token == job.token + 1


def test_a_heart_that_beats_late_keeps_a_job_that_nobody_took(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    """The catalog was away for longer than the lease; nothing healthy is stopped for it."""
    put(catalog)
    job = claimed(queue)
    clock.now += 5 * LEASE
    assert queue.heartbeat({job.id: job.token}, LEASE) == {}
    assert queue.reclaim() == 0
    assert finish(catalog, queue, job).status == "succeeded"


def test_what_a_stale_worker_writes_is_void(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    put(catalog)
    stale = claimed(queue, "w1")
    clock.now += LEASE + 1
    queue.reclaim()
    clock.now += 60
    fresh = claimed(queue, "w2")
    before = read(catalog, fresh)

    assert queue.heartbeat({stale.id: stale.token}, LEASE) == {stale.id: "lost"}
    with pytest.raises(LeaseLost):
        queue.progress(stale.id, stale.token, 0.9, "stale")
    with pytest.raises(LeaseLost):
        queue.event(stale.id, stale.token, "log", "stale", {})
    with pytest.raises(LeaseLost):
        queue.checkpoint(stale.id, stale.token, "fold-1", "0" * 64)
    with pytest.raises(LeaseLost):
        queue.fail(stale.id, stale.token, {"message": "stale", "code": "x"})
    with pytest.raises(LeaseLost):
        queue.release(stale.id, stale.token)
    with pytest.raises(LeaseLost):
        commit_with_artifact(catalog, queue, stale)
    assert queue.ended(stale.id, stale.token, "killed") is None

    assert read(catalog, fresh) == before
    with catalog.read() as tx:
        assert tx.count(Artifact) == 0
        assert tx.count(Checkpoint) == 0
    assert finish(catalog, queue, fresh).status == "succeeded"


def test_a_job_that_was_put_back_is_nobodys_until_it_is_claimed(catalog: Catalog, queue: Queue) -> None:
    put(catalog)
    job = claimed(queue)
    queue.release(job.id, job.token)
    with pytest.raises(LeaseLost):  # though the token is still the same
        finish(catalog, queue, job)
    assert queue.stops({job.id: job.token}) == {job.id: "lost"}


def test_a_new_worker_takes_back_at_once_what_its_predecessor_held(catalog: Catalog, queue: Queue) -> None:
    put(catalog)
    put(catalog)
    mine, others = claimed(queue, "host:/home_a#1"), claimed(queue, "host:/homeXa#1")
    assert queue.release_owner("host:/home_a#") == 1
    assert read(catalog, others).status == "running"
    assert read(catalog, mine).idle_deaths == 0
    assert claimed(queue, "host:/home_a#2").id == mine.id


def test_five_deaths_in_a_row_end_a_job(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    job = put(catalog)
    waits = []
    for _ in range(5):
        clock.now += 100
        held_now = claimed(queue)
        after = queue.ended(held_now.id, held_now.token, "its process was killed by SIGKILL")
        assert after is not None
        waits.append(after.available_at - clock.now)
    assert waits[:4] == [0.5, 1, 2, 4]
    ended = read(catalog, job)
    assert (ended.status, ended.attempt) == ("failed", 5)
    assert ended.error is not None
    assert ended.error["code"] == "died"
    assert "died 5 times" in ended.error["message"]
    assert "SIGKILL" in ended.error["message"]


def test_a_job_whose_own_code_ends_it_is_given_up_sooner(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    job = put(catalog)
    for _ in range(2):
        clock.now += 100
        held_now = claimed(queue)
        queue.ended(held_now.id, held_now.token, "its process was killed by SIGSEGV", tries=2)
    ended = read(catalog, job)
    assert (ended.status, ended.attempt) == ("failed", 2)
    assert ended.error is not None
    assert "died 2 times" in ended.error["message"]


def test_deaths_after_a_checkpoint_are_not_counted(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    job = put(catalog)
    for number in range(20):
        clock.now += 100
        held_now = claimed(queue)
        queue.checkpoint(held_now.id, held_now.token, f"fold-{number}", f"{number:064x}")
        queue.ended(held_now.id, held_now.token, "killed")
    assert read(catalog, job).status == "queued"
    assert queue.restore(job.id, "fold-7") == f"{7:064x}"
    assert queue.restore(job.id, "fold-99") is None
    clock.now += 100
    finish(catalog, queue, claimed(queue))
    with catalog.read() as tx:
        assert tx.count(Checkpoint) == 0


def test_what_is_nobodys_fault_is_tried_again_five_times(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    job = put(catalog)
    for _ in range(5):
        clock.now += 100
        held_now = claimed(queue)
        queue.retry(held_now.id, held_now.token, {"message": "out of memory", "code": "out_of_memory", "status": 500})
    error = read(catalog, job).error
    assert error is not None
    assert error["code"] == "out_of_memory"
    assert "failed 5 times" in error["message"]


def test_an_error_of_the_request_ends_the_job_at_once(catalog: Catalog, queue: Queue) -> None:
    put(catalog)
    job = claimed(queue)
    queue.fail(job.id, job.token, InvalidInput("no such column", param="target", detail={"row": 3}).as_dict())
    ended = read(catalog, job)
    assert ended.status == "failed"
    assert ended.error is not None
    assert (ended.error["param"], ended.error["detail"]) == ("target", {"row": 3})
    assert ended.lease_owner is None
    assert ended.finished_at


def test_cancel_ends_a_waiting_job_and_is_idempotent(catalog: Catalog, queue: Queue) -> None:
    job = put(catalog)
    with catalog.write() as tx:
        tx.add(Artifact(project_id="proj_a", digest="0" * 64, kind=q.UPLOAD, size=1, owner_id=job.id))
    for _ in range(2):
        with catalog.write() as tx:
            assert queue.cancel(tx, tx.get(Job, job.id)).status == "cancelled"
    with catalog.read() as tx:
        assert tx.count(Artifact) == 0  # the upload is no longer kept
    assert queue.claim("w", LEASE) is None


def test_a_running_job_is_cancelling_until_its_process_is_gone(catalog: Catalog, queue: Queue) -> None:
    put(catalog)
    job = claimed(queue)
    for _ in range(2):
        with catalog.write() as tx:
            assert queue.cancel(tx, tx.get(Job, job.id)).status == "cancelling"
    assert queue.stops({job.id: job.token}) == {job.id: "cancelling"}
    with pytest.raises(Cancelled):
        queue.progress(job.id, job.token, 0.5, "fitting")
    with pytest.raises(Cancelled):  # what it made just now is not registered any more
        finish(catalog, queue, job)
    after = queue.ended(job.id, job.token, "SIGTERM")
    assert after is not None
    assert after.status == "cancelled"


@pytest.mark.parametrize("way", ["reclaim", "release", "release_owner", "fail", "retry", "cancelled"])
def test_a_cancelled_job_never_runs_again_whichever_way_it_is_given_up(
    catalog: Catalog, queue: Queue, clock: Clock, way: str
) -> None:
    put(catalog)
    job = claimed(queue)
    with catalog.write() as tx:
        queue.cancel(tx, tx.get(Job, job.id))
    clock.now += LEASE + 1
    error = {"message": "m", "code": "c", "status": 400}
    {
        "reclaim": queue.reclaim,
        "release": lambda: queue.release(job.id, job.token),
        "release_owner": lambda: queue.release_owner("host:"),
        "fail": lambda: queue.fail(job.id, job.token, error),
        "retry": lambda: queue.retry(job.id, job.token, error),
        "cancelled": lambda: queue.cancelled(job.id, job.token),
    }[way]()
    assert read(catalog, job).status == "cancelled"


def test_pause_lets_go_and_keeps_the_checkpoints(catalog: Catalog, queue: Queue, clock: Clock) -> None:
    put(catalog)
    job = claimed(queue)
    queue.checkpoint(job.id, job.token, "fold-1", "1" * 64)
    with catalog.write() as tx:
        paused = queue.pause(tx, tx.get(Job, job.id))
        assert queue.pause(tx, paused) is paused
    assert queue.stops({job.id: job.token}) == {job.id: "paused"}
    with pytest.raises(LeaseLost):
        queue.progress(job.id, job.token, 0.5, "fitting")
    assert queue.ended(job.id, job.token, "SIGTERM") is None
    clock.now += 10 * LEASE
    assert queue.reclaim() == 0
    assert queue.claim("w", LEASE) is None
    with catalog.write() as tx:
        queue.resume(tx, tx.get(Job, job.id))
    again = claimed(queue)
    assert again.token == job.token + 1
    assert queue.restore(job.id, "fold-1") == "1" * 64
    finish(catalog, queue, again)
    with pytest.raises(Conflict), catalog.write() as tx:
        queue.pause(tx, tx.get(Job, job.id))
    with pytest.raises(Conflict), catalog.write() as tx:
        queue.resume(tx, tx.get(Job, job.id))


def test_events_are_numbered_and_bounded(catalog: Catalog, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_EVENTS", 10)
    put(catalog)
    job = claimed(queue)
    for number in range(20):
        queue.event(job.id, job.token, "log", "x" * 5000, {"number": number})
    finish(catalog, queue, job)
    with catalog.read() as tx:
        events = tx.list(JobEvent, job_id=job.id, order_by=tx.table(JobEvent).c.seq)
    assert [event.seq for event in events] == list(range(1, 12))
    assert max(len(event.message) for event in events) == q.MAX_TEXT
    assert events[-1].data == {"status": "succeeded"}


def test_progress_is_an_event_only_when_it_tells_something(catalog: Catalog, queue: Queue) -> None:
    put(catalog)
    job = claimed(queue)
    for step in range(100):
        queue.progress(job.id, job.token, step / 100, "fitting")
    queue.progress(job.id, job.token, 1.0, "packaging", {"accuracy": 0.9})
    with catalog.read() as tx:
        ordered = tx.list(JobEvent, job_id=job.id, order_by=tx.table(JobEvent).c.seq)
    events = [event for event in ordered if event.kind == "progress"]
    assert 2 < len(events) < 30
    assert events[-1].data == {"progress": 1.0, "accuracy": 0.9}
    assert read(catalog, job).progress == 1.0


def test_held_needs_the_token_and_a_held_state(catalog: Catalog, queue: Queue) -> None:
    job = put(catalog)
    with catalog.read() as tx, pytest.raises(LeaseLost):
        held(tx, job.id, 0)
    with catalog.read() as tx, pytest.raises(LeaseLost):
        held(tx, "job_none", 1)


def _drain(queue: Queue, owner: str) -> list[str]:
    """Claim and finish until there is nothing left."""
    mine = []
    while job := queue.claim(owner, LEASE):
        with queue._catalog.write() as tx:
            queue.finish(tx, still_running(tx, job.id, job.token))
        mine.append(job.id)
    return mine


def _drain_process(path: str, owner: str, answers: Any) -> None:
    answers.put(_drain(Queue(Catalog(Path(path), busy_timeout=30)), owner))


def test_threads_and_processes_never_claim_a_job_twice(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path, busy_timeout=30)
    catalog.migrate()
    jobs = [put(catalog) for _ in range(60)]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_drain_process, args=(str(path), f"p{n}", answers)) for n in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as pool:
        done = [id for part in pool.map(lambda n: _drain(Queue(catalog), f"t{n}"), range(2)) for id in part]
    for process in processes:
        done += answers.get(timeout=60)
        process.join()
    assert Counter(done) == Counter(job.id for job in jobs)
    with catalog.read() as tx:
        assert {(job.status, job.token) for job in tx.list(Job)} == {("succeeded", 1)}
    catalog.close()


def test_logs_of_jobs_that_ended_long_ago_go(catalog: Catalog, queue: Queue, tmp_path: Path) -> None:
    done, waiting = put(catalog), put(catalog)
    finish(catalog, queue, claimed(queue))
    now = time.time()
    for name, age in (
        (f"{done.id}.log", 100),
        (f"{done.id}.trace", 10),
        (f"{waiting.id}.log", 100),
        ("other.log", 100),
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    assert prune_logs(catalog, tmp_path, older_than=60) == 1
    left = {path.name for path in tmp_path.iterdir() if path.suffix in (".log", ".trace")}
    assert left == {f"{done.id}.trace", f"{waiting.id}.log", "other.log"}
