"""Tasks are admitted oldest first. Small tasks may overtake large ones a limited number of times."""

import time

import pytest

from sandbox.model.fixed_limits import QUEUE_OVERTAKES_MAX, UNFINISHED_TASKS_MAX
from sandbox.model.resources import Resources
from sandbox.server.scheduler import Scheduler

GIB = 1024**3
TOTAL = Resources(cpus=8, memory_bytes=16 * GIB, disk_bytes=100 * GIB)
SMALL = Resources(2, 2 * GIB, 10 * GIB)
HALF = Resources(4, 8 * GIB, 40 * GIB)


@pytest.fixture
def scheduler():
    return Scheduler(TOTAL)


def test_tasks_are_admitted_in_order_while_resources_last(scheduler):
    for name in "abc":
        scheduler.enqueue(name, HALF)
    assert [scheduler.admit_next(), scheduler.admit_next(), scheduler.admit_next()] == ["a", "b", None]


CPU_HOST, MEMORY_HOST = Resources(16, 8 * GIB, 50 * GIB), Resources(4, 64 * GIB, 50 * GIB)


def test_engine_queues_all_tasks_that_fit_on_a_host():
    """The tasks together need more than all hosts have, and the server's free memory does not matter."""
    scheduler = Scheduler(MEMORY_HOST, [CPU_HOST, MEMORY_HOST])
    for number in range(20):
        scheduler.enqueue(f"cpus-{number}", Resources(16, GIB, GIB))
        scheduler.enqueue(f"memory-{number}", Resources(1, 64 * GIB, GIB))
    admitted = [scheduler.admit_next(1) for _ in range(40)]
    assert admitted == [f"{kind}-{number}" for number in range(20) for kind in ("cpus", "memory")]
    assert scheduler.admit_next() is None


def test_thousands_of_tasks_are_handed_to_an_engine_quickly():
    """The server does nothing else until all tasks are admitted."""
    scheduler = Scheduler(MEMORY_HOST, [CPU_HOST, MEMORY_HOST])
    for number in range(UNFINISHED_TASKS_MAX):
        scheduler.enqueue(f"task-{number}", SMALL)
    started = time.process_time()
    assert all(scheduler.admit_next() for _ in range(UNFINISHED_TASKS_MAX))
    assert time.process_time() - started < 0.3


def test_task_that_fits_on_no_host_waits_and_names_the_closest_host():
    scheduler = Scheduler(MEMORY_HOST, [CPU_HOST, MEMORY_HOST])
    scheduler.enqueue("both", Resources(5, 9 * GIB, GIB))
    scheduler.enqueue("cpus", Resources(17, GIB, GIB))
    scheduler.enqueue("next", SMALL)
    assert scheduler.admit_next() == "next"
    messages = scheduler.waiting_messages()
    assert "9 GiB of memory (8 GiB in all)" in messages["both"]
    assert "17 CPUs (16 in all)" in messages["cpus"]


def test_removed_task_frees_resources(scheduler):
    for name in "abc":
        scheduler.enqueue(name, HALF)
    scheduler.admit_next(), scheduler.admit_next()
    scheduler.remove("a")
    assert scheduler.admit_next() == "c"


def test_small_tasks_overtake_a_large_one_up_to_a_limit(scheduler):
    scheduler.reserve("running", Resources(6, GIB, GIB))
    scheduler.enqueue("large", HALF)
    for number in range(QUEUE_OVERTAKES_MAX + 1):
        scheduler.enqueue(f"small-{number}", SMALL)
        scheduler.enqueue(f"smaller-{number}", Resources(1, GIB, GIB))
    admitted = []
    while (task_id := scheduler.admit_next()) is not None:
        admitted.append(task_id)
        scheduler.remove(task_id)
    assert admitted == [
        f"{size}-{number}" for number in range(QUEUE_OVERTAKES_MAX // 2) for size in ("small", "smaller")
    ]

    scheduler.remove("running")
    assert scheduler.admit_next() == "large"
    assert scheduler.admit_next() == f"small-{QUEUE_OVERTAKES_MAX // 2}"


def test_task_that_this_server_cannot_start_is_skipped_without_delaying_others(scheduler):
    scheduler.enqueue("blocked", SMALL, "No key.")
    for number in range(QUEUE_OVERTAKES_MAX + 1):
        scheduler.enqueue(f"task-{number}", SMALL)
        assert scheduler.admit_next() == f"task-{number}"
        scheduler.remove(f"task-{number}")
    scheduler.reserve("running", TOTAL)
    scheduler.enqueue("next", SMALL)
    assert scheduler.admit_next() is None
    assert scheduler.waiting_messages()["blocked"] == "Waiting: No key."
    assert scheduler.waiting_messages()["next"].startswith("Waiting for 2 CPUs")


def test_overtake_limit_is_per_task(scheduler):
    scheduler.reserve("running", Resources(6, GIB, GIB))
    for number in range(QUEUE_OVERTAKES_MAX):
        scheduler.enqueue(f"large-{number}", HALF)
        scheduler.enqueue(f"small-{number}", SMALL)
    admitted = []
    while (task_id := scheduler.admit_next()) is not None:
        admitted.append(task_id)
        scheduler.remove(task_id)
    assert admitted == [f"small-{number}" for number in range(QUEUE_OVERTAKES_MAX)]
    scheduler.remove("running")
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["large-0", "large-1"]


def test_task_that_fits_is_not_overtaken(scheduler):
    scheduler.enqueue("large", HALF)
    scheduler.enqueue("small", SMALL)
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["large", "small"]


def test_task_larger_than_the_machine_does_not_block_others(scheduler):
    scheduler.enqueue("huge", Resources(9, 17 * GIB, GIB))
    for number in range(3 * QUEUE_OVERTAKES_MAX):
        scheduler.enqueue(str(number), SMALL)
        assert scheduler.admit_next() == str(number)
        scheduler.remove(str(number))
    scheduler.reserve("running", TOTAL)
    scheduler.enqueue("next", SMALL)
    reasons = scheduler.waiting_messages()
    assert "9 CPUs (8 in all) and 17 GiB of memory (16 GiB in all)" in reasons["huge"]
    assert "cancel the task" in reasons["huge"]
    assert reasons["next"].startswith("Waiting for 2 CPUs")


def test_task_waits_for_free_memory_on_the_machine(scheduler):
    scheduler.enqueue("a", SMALL)
    half_gib = 512 * 1024**2
    assert scheduler.admit_next(half_gib - 1) is None
    assert scheduler.waiting_messages(half_gib - 1) == {
        "a": "Waiting for 0.5 GiB of free memory (the machine has 0.5 GiB)"
    }
    assert scheduler.admit_next(half_gib) == "a"


def test_resources_are_formatted_without_exponents():
    assert str(Resources(16, GIB // 4, 12345 * GIB)) == "16 CPUs, 0.25 GiB of memory and 12,345 GiB of disk"


def test_small_task_waits_only_for_the_memory_it_requests(scheduler):
    scheduler.enqueue("large", SMALL)
    scheduler.enqueue("tiny", Resources(1, 128 * 1024**2, GIB))
    assert scheduler.admit_next(127 * 1024**2) is None
    assert scheduler.admit_next(128 * 1024**2) == "tiny"
    assert scheduler.admit_next(128 * 1024**2) is None


def test_unknown_free_memory_does_not_block(scheduler):
    scheduler.enqueue("a", SMALL)
    assert scheduler.admit_next(None) == "a"


def test_pending_task_reports_what_it_waits_for(scheduler):
    scheduler.reserve("running", Resources(6, 15 * GIB, GIB))
    scheduler.enqueue("large", HALF)
    scheduler.enqueue("next", SMALL)
    assert scheduler.waiting_messages() == {
        "large": "Waiting for 4 CPUs (2 free) and 8 GiB of memory (1 GiB free)",
        "next": "Waiting behind 1 other task",
    }


def test_removed_task_is_not_admitted(scheduler):
    scheduler.enqueue("a", HALF)
    scheduler.enqueue("b", HALF)
    scheduler.remove("a")
    assert scheduler.admit_next() == "b"


def test_requeued_task_is_first_and_has_no_reservation(scheduler):
    for name in ("first", "second", "third"):
        scheduler.enqueue(name, HALF)
    assert [scheduler.admit_next(), scheduler.admit_next(), scheduler.admit_next()] == ["first", "second", None]
    scheduler.requeue("first")
    assert not scheduler.has_reservation("first")
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["first", None]
    scheduler.remove("first")
    scheduler.requeue("first")
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["third", None]


def test_requeued_tasks_keep_their_order(scheduler):
    for name in ("old", "young", "youngest"):
        scheduler.enqueue(name, HALF)
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["old", "young"]
    scheduler.requeue("old")
    scheduler.requeue("young")
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["old", "young"]


def test_disk_is_reserved():
    scheduler = Scheduler(Resources(100, 100 * GIB, 50 * GIB))
    scheduler.enqueue("a", HALF)
    scheduler.enqueue("b", HALF)
    assert [scheduler.admit_next(), scheduler.admit_next()] == ["a", None]
    assert scheduler.waiting_messages() == {"b": "Waiting for 40 GiB of disk (10 GiB free)"}
