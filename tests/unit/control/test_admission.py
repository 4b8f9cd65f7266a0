"""Tasks are let in first come, first served, as far as room is promised."""

import pytest

from sandbox.control.admission import Capacity, WaitingRoom

GIB = 1024**3
TOTAL = Capacity(cpus=8, memory_bytes=16 * GIB, disk_bytes=100 * GIB)
SMALL = Capacity(2, 2 * GIB, 10 * GIB)
HALF = Capacity(4, 8 * GIB, 40 * GIB)


@pytest.fixture
def room():
    return WaitingRoom(TOTAL)


def test_the_first_in_line_is_let_in_while_there_is_room(room):
    for name in "abc":
        room.enter(name, HALF)
    assert [room.admit(), room.admit(), room.admit()] == ["a", "b", None]


def test_who_leaves_makes_room(room):
    for name in "abc":
        room.enter(name, HALF)
    room.admit(), room.admit()
    room.leave("a")
    assert room.admit() == "c"


def test_a_small_task_does_not_pass_a_large_one_that_waits(room):
    room.claim("running", Capacity(6, GIB, GIB))
    room.enter("large", HALF)
    room.enter("small", SMALL)
    assert room.admit() is None


def test_who_waits_is_told_for_what(room):
    room.claim("running", Capacity(6, 15 * GIB, GIB))
    room.enter("large", HALF)
    room.enter("next", SMALL)
    assert room.complaints() == {
        "large": "Waiting for 4 CPUs (2 free) and 8 GiB of memory (1 GiB free)",
        "next": "Waiting behind 1 other task",
    }


def test_who_gives_up_waiting_is_not_let_in(room):
    room.enter("a", HALF)
    room.enter("b", HALF)
    room.leave("a")
    assert room.admit() == "b"


def test_disk_is_promised_too():
    room = WaitingRoom(Capacity(100, 100 * GIB, 50 * GIB))
    room.enter("a", HALF)
    room.enter("b", HALF)
    assert [room.admit(), room.admit()] == ["a", None]
    assert room.complaints() == {"b": "Waiting for 40 GiB of disk (10 GiB free)"}
