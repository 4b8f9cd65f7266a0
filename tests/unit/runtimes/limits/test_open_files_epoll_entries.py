"""A sandbox's epoll entries are counted only while the machine has enough entries to exceed the limit."""

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import EPOLL_ENTRIES_MAX
from sandbox.runtimes.limits import open_files
from sandbox.runtimes.limits.open_files import EpollCounter, count_machine_epoll_entries
from sandbox.runtimes.limits.usage_limits import FileUsage

MANY = EPOLL_ENTRIES_MAX + 1
SLABS = """slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables ...
eventpoll_pwq        700    784     72   56    1 : tunables    0    0    0 : slabdata     14     14      0
eventpoll_epi       1334   1440    128   32    1 : tunables    0    0    0 : slabdata     14     14      0
"""


class FakeEpollUsage:
    """The epoll entry count of the whole machine, set by the test."""

    def __init__(self, entries: int | None = 0) -> None:
        self.entries = entries

    def count(self) -> int | None:
        return self.entries


@pytest.fixture
def five_entries() -> Iterator[None]:
    """Make this process watch five descriptors with one epoll instance."""
    with ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        reader, writer = os.pipe()
        copies = [reader, *(os.dup(reader) for _ in range(4))]
        for one in (*copies, writer):
            stack.callback(os.close, one)
        for one in copies:
            poll.register(one, select.EPOLLIN)
        yield


@pytest.fixture
def descriptors_in_flight() -> Iterator[None]:
    """Make this process send itself a descriptor that it never receives."""
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [0])
        yield


@pytest.mark.parametrize(
    ("capacity", "entries"),
    [
        ("1440 N0=1440\n", 0),
        (f"{EPOLL_ENTRIES_MAX // 8} N0=1 N1=2\n", 0),
        (f"{EPOLL_ENTRIES_MAX // 8 + 1} N0=1 N1=2\n", 1334),
        ("", 1334),
        ("unknown\n", 1334),
    ],
)
def test_machine_entries_are_read_from_slabinfo_unless_the_machine_has_few(tmp_path: Path, capacity: str, entries: int):
    (tmp_path / "slabinfo").write_text(SLABS)
    (tmp_path / "capacity").write_text(capacity)
    assert count_machine_epoll_entries(tmp_path / "slabinfo", tmp_path / "capacity") == entries


def test_machine_entries_are_read_from_slabinfo_if_the_capacity_is_unknown(tmp_path: Path):
    (tmp_path / "slabinfo").write_text(SLABS)
    assert count_machine_epoll_entries(tmp_path / "slabinfo", tmp_path / "absent") == 1334


def test_machine_entries_are_unknown_without_slabinfo_or_its_row(tmp_path: Path):
    absent = tmp_path / "absent"
    assert count_machine_epoll_entries(absent, absent) is None
    (tmp_path / "slabinfo").write_text("slabinfo - version: 2.1\n")
    assert count_machine_epoll_entries(tmp_path / "slabinfo", absent) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can read slab statistics")
def test_kernel_capacity_covers_its_entries(five_entries: None):
    """An entry that the capacity did not cover would never be counted."""
    of_kernel = open_files._EPOLL_CAPACITY_FILE
    if not of_kernel.exists():
        pytest.skip("this kernel does not show the capacity")
    assert (
        int(of_kernel.read_text().split()[0]) >= (count_machine_epoll_entries(capacity_file=Path("absent")) or 0) >= 5
    )


@pytest.mark.usefixtures("five_entries")
@pytest.mark.parametrize(("machine", "counted"), [(None, True), (MANY, True), (EPOLL_ENTRIES_MAX, False), (0, False)])
def test_entries_are_counted_only_if_the_machine_has_many(machine: int | None, counted: bool):
    assert (EpollCounter(FakeEpollUsage(machine).count).count([os.getpid()]) >= 5) == counted


@pytest.mark.usefixtures("five_entries")
def test_count_includes_entries_that_the_processes_added():
    assert EpollCounter(FakeEpollUsage(MANY).count).count([]) == 0
    counter = EpollCounter(FakeEpollUsage(MANY).count)
    before = counter.count([os.getpid()])
    with select.epoll() as poll, select.epoll() as watched:
        poll.register(watched.fileno(), select.EPOLLIN)
        assert counter.count([os.getpid()]) == before + 1


@pytest.mark.usefixtures("five_entries")
def test_count_does_not_exceed_the_entries_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_files, "EPOLL_ENTRIES_MAX", 1)
    assert EpollCounter(FakeEpollUsage(2).count).count([os.getpid()]) == 2


@pytest.mark.usefixtures("five_entries")
def test_entries_of_an_inherited_instance_are_counted_once():
    counter = EpollCounter(FakeEpollUsage(MANY).count)
    before = counter.count([os.getpid()])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        assert counter.count([os.getpid(), child]) == before
    finally:
        os.close(reader)
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.usefixtures("descriptors_in_flight")
def test_growth_is_attributed_to_a_sandbox_that_keeps_descriptors_in_transit():
    machine = FakeEpollUsage(100)
    counter = EpollCounter(machine.count)
    machine.entries = 100 + MANY
    counts = [counter.count([os.getpid()]) for _ in range(3)]
    assert [count > EPOLL_ENTRIES_MAX for count in counts] == [False, False, True]
    assert counts[-1] == MANY


@pytest.mark.usefixtures("descriptors_in_flight")
def test_growth_is_counted_from_the_lowest_count():
    machine = FakeEpollUsage(2 * MANY)
    counter = EpollCounter(machine.count)
    counts = []
    for entries in (10, MANY + 10, MANY + 10, MANY + 10):
        machine.entries = entries
        counts.append(counter.count([os.getpid()]))
    assert counts[-1] == MANY


@pytest.mark.usefixtures("descriptors_in_flight")
@pytest.mark.parametrize("before", [1, 50_000])
def test_entries_older_than_the_counter_are_not_attributed(before: int):
    machine = FakeEpollUsage(before)
    counter = EpollCounter(machine.count)
    machine.entries = before + EPOLL_ENTRIES_MAX
    assert all(counter.count([os.getpid()]) <= EPOLL_ENTRIES_MAX for _ in range(4))


@pytest.mark.usefixtures("descriptors_in_flight")
def test_growth_found_in_other_sandboxes_is_not_attributed(monkeypatch: pytest.MonkeyPatch):
    """The instances of two other sandboxes can be inspected, and have 30,000 entries each."""
    inspect = open_files._inspect
    monkeypatch.setattr(open_files, "_inspect", lambda ids: inspect(ids) if ids else open_files._Inspection(30_000))
    machine = FakeEpollUsage(100)
    counter = EpollCounter(machine.count)
    machine.entries = 100 + 60_000
    assert all(counter.count([os.getpid()], lambda: [[], []]) <= EPOLL_ENTRIES_MAX for _ in range(5))
    machine.entries += MANY
    assert counter.count([os.getpid()], lambda: [[], []]) == MANY


@pytest.mark.usefixtures("descriptors_in_flight")
def test_growth_is_not_attributed_while_another_sandbox_delays_its_inspection(monkeypatch: pytest.MonkeyPatch):
    """A program can hold the lock of an instance, which the kernel needs to list the entries."""
    inspect, ended = open_files._inspect, threading.Event()
    monkeypatch.setattr(
        open_files, "_inspect", lambda ids: inspect(ids) if ids else ended.wait(20) and open_files._Inspection()
    )
    machine = FakeEpollUsage(100)
    counter = EpollCounter(machine.count)
    machine.entries = 100 + 10 * MANY
    started_at = time.monotonic()
    try:
        assert all(counter.count([os.getpid()], lambda: [[]]) <= EPOLL_ENTRIES_MAX for _ in range(4))
    finally:
        ended.set()
    assert time.monotonic() - started_at < 19


@pytest.mark.usefixtures("descriptors_in_flight")
@pytest.mark.parametrize(("entries", "was_cut_short"), [(EPOLL_ENTRIES_MAX + 1, False), (0, True)])
def test_growth_is_not_attributed_while_another_sandbox_is_about_to_end(
    monkeypatch: pytest.MonkeyPatch, entries: int, was_cut_short: bool
):
    inspect, other = open_files._inspect, open_files._Inspection(entries, was_cut_short=was_cut_short)
    monkeypatch.setattr(open_files, "_inspect", lambda ids: inspect(ids) if ids else other)
    machine = FakeEpollUsage(100)
    counter = EpollCounter(machine.count)
    machine.entries = 100 + 10 * MANY
    assert all(counter.count([os.getpid()], lambda: [[]]) <= EPOLL_ENTRIES_MAX for _ in range(5))


def test_growth_is_not_attributed_to_a_sandbox_without_descriptors_in_transit():
    machine = FakeEpollUsage(0)
    counter = EpollCounter(machine.count)
    machine.entries = 10 * MANY
    assert all(counter.count([os.getpid()]) <= EPOLL_ENTRIES_MAX for _ in range(4))


@pytest.mark.usefixtures("descriptors_in_flight")
def test_counts_with_descriptors_in_transit_must_be_consecutive():
    machine = FakeEpollUsage(0)
    counter = EpollCounter(machine.count)
    for entries in (MANY, MANY, 0, MANY, MANY):
        machine.entries = entries
        assert counter.count([os.getpid()]) <= EPOLL_ENTRIES_MAX


def test_count_that_takes_too_long_is_marked_as_incomplete(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_files, "_INSPECTION_SECONDS", -1)
    machine = FakeEpollUsage(MANY)
    counter = EpollCounter(machine.count)
    counter.count([os.getpid()])
    assert counter.was_cut_short
    machine.entries = 0
    counter.count([os.getpid()])
    assert not counter.was_cut_short


def test_ended_process_has_no_entries():
    assert EpollCounter(FakeEpollUsage(MANY).count).count([2**22 + 1]) == 0


def test_too_many_entries_are_a_violation():
    assert not FileUsage(epoll_entries=EPOLL_ENTRIES_MAX).find_exceeded_limit()
    assert f"more than {EPOLL_ENTRIES_MAX} epoll entries" in FileUsage(epoll_entries=MANY).find_exceeded_limit()
