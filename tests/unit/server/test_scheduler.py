"""Tasks are let in oldest first, as room allows; small ones may pass within a bound, so that nothing starves."""

import pytest

from sandbox.model.limits import QUEUE_OVERTAKES_MAX
from sandbox.server.scheduler import Resources, Scheduler

GIB = 1024**3
TOTAL = Resources(cpus=8, memory_bytes=16 * GIB, disk_bytes=100 * GIB)
SMALL = Resources(2, 2 * GIB, 10 * GIB)
HALF = Resources(4, 8 * GIB, 40 * GIB)


@pytest.fixture
def room():
    return Scheduler(TOTAL)


def test_the_first_in_line_is_let_in_while_there_is_room(room):
    for name in "abc":
        room.enqueue(name, HALF)
    assert [room.admit_next(), room.admit_next(), room.admit_next()] == ["a", "b", None]


def test_who_leaves_makes_room(room):
    for name in "abc":
        room.enqueue(name, HALF)
    room.admit_next(), room.admit_next()
    room.remove("a")
    assert room.admit_next() == "c"


def test_small_tasks_pass_a_large_one_that_waits_a_few_times_and_then_wait_for_it(room):
    room.reserve("running", Resources(6, GIB, GIB))
    room.enqueue("large", HALF)
    for number in range(QUEUE_OVERTAKES_MAX + 1):
        room.enqueue(f"small-{number}", SMALL)
        room.enqueue(f"smaller-{number}", Resources(1, GIB, GIB))
    begun = []
    while (task_id := room.admit_next()) is not None:
        begun.append(task_id)
        room.remove(task_id)
    assert begun == [f"{size}-{number}" for number in range(QUEUE_OVERTAKES_MAX // 2) for size in ("small", "smaller")]

    room.remove("running")
    assert room.admit_next() == "large"
    assert room.admit_next() == f"small-{QUEUE_OVERTAKES_MAX // 2}"


def test_each_task_that_is_passed_has_a_bound_of_its_own(room):
    room.reserve("running", Resources(6, GIB, GIB))
    for number in range(QUEUE_OVERTAKES_MAX):
        room.enqueue(f"large-{number}", HALF)
        room.enqueue(f"small-{number}", SMALL)
    begun = []
    while (task_id := room.admit_next()) is not None:
        begun.append(task_id)
        room.remove(task_id)
    assert begun == [f"small-{number}" for number in range(QUEUE_OVERTAKES_MAX)]
    room.remove("running")
    assert [room.admit_next(), room.admit_next()] == ["large-0", "large-1"]


def test_a_task_is_never_passed_where_there_is_room_for_it(room):
    room.enqueue("large", HALF)
    room.enqueue("small", SMALL)
    assert [room.admit_next(), room.admit_next()] == ["large", "small"]


def test_a_task_that_a_shrunken_machine_has_no_room_for_keeps_nobody_waiting(room):
    room.enqueue("huge", Resources(9, 17 * GIB, GIB))
    for number in range(3 * QUEUE_OVERTAKES_MAX):
        room.enqueue(str(number), SMALL)
        assert room.admit_next() == str(number)
        room.remove(str(number))
    room.reserve("running", TOTAL)
    room.enqueue("next", SMALL)
    told = room.pending_reasons()
    assert "9 CPUs (8 in all) and 17 GiB of memory (16 GiB in all)" in told["huge"]
    assert "cancel the task" in told["huge"]
    assert told["next"].startswith("Waiting for 2 CPUs")


def test_a_task_waits_while_the_machine_itself_has_no_memory(room):
    room.enqueue("a", SMALL)
    half_a_gib = 512 * 1024**2
    assert room.admit_next(half_a_gib - 1) is None
    assert room.pending_reasons(half_a_gib - 1) == {"a": "Waiting for 0.5 GiB of free memory (the machine has 0.5 GiB)"}
    assert room.admit_next(half_a_gib) == "a"


def test_sizes_are_told_in_digits_however_large():
    assert str(Resources(16, GIB // 4, 12345 * GIB)) == "16 CPUs, 0.25 GiB of memory and 12345 GiB of disk"


def test_a_task_that_asks_for_little_waits_for_no_more_than_that(room):
    room.enqueue("large", SMALL)
    room.enqueue("tiny", Resources(1, 128 * 1024**2, GIB))
    assert room.admit_next(127 * 1024**2) is None
    assert room.admit_next(128 * 1024**2) == "tiny"
    assert room.admit_next(128 * 1024**2) is None


def test_a_machine_that_does_not_tell_its_memory_keeps_nobody_waiting(room):
    room.enqueue("a", SMALL)
    assert room.admit_next(None) == "a"


def test_who_waits_is_told_for_what(room):
    room.reserve("running", Resources(6, 15 * GIB, GIB))
    room.enqueue("large", HALF)
    room.enqueue("next", SMALL)
    assert room.pending_reasons() == {
        "large": "Waiting for 4 CPUs (2 free) and 8 GiB of memory (1 GiB free)",
        "next": "Waiting behind 1 other task",
    }


def test_who_gives_up_waiting_is_not_let_in(room):
    room.enqueue("a", HALF)
    room.enqueue("b", HALF)
    room.remove("a")
    assert room.admit_next() == "b"


def test_who_is_put_back_is_the_first_in_line_again_and_holds_no_room(room):
    for name in ("first", "second", "third"):
        room.enqueue(name, HALF)
    assert [room.admit_next(), room.admit_next(), room.admit_next()] == ["first", "second", None]
    room.requeue("first")
    assert not room.has_reservation("first")
    assert [room.admit_next(), room.admit_next()] == ["first", None]
    room.remove("first")
    room.requeue("first")
    assert [room.admit_next(), room.admit_next()] == ["third", None]


def test_those_who_are_put_back_stand_in_the_order_in_which_they_came(room):
    for name in ("old", "young", "youngest"):
        room.enqueue(name, HALF)
    assert [room.admit_next(), room.admit_next()] == ["old", "young"]
    room.requeue("old")
    room.requeue("young")
    assert [room.admit_next(), room.admit_next()] == ["old", "young"]


def test_disk_is_promised_too():
    room = Scheduler(Resources(100, 100 * GIB, 50 * GIB))
    room.enqueue("a", HALF)
    room.enqueue("b", HALF)
    assert [room.admit_next(), room.admit_next()] == ["a", None]
    assert room.pending_reasons() == {"b": "Waiting for 40 GiB of disk (10 GiB free)"}
