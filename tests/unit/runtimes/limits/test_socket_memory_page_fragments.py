"""The memory that small packets keep allocated, from the machine's memory and the sockets of a sandbox."""

import socket
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import PAGE_FRAGMENT_BYTES_MAX
from sandbox.runtimes.limits.open_files import list_directory
from sandbox.runtimes.limits.socket_memory import (
    PageFragmentMeter,
    SocketUsage,
    count_free_bytes_of_processors,
    count_own_overhead_bytes,
    count_unattributed_bytes,
)
from sandbox.runtimes.limits.usage_limits import KernelUsage

MEBIBYTE = 1 << 20
MANY_PACKETS = SocketUsage(overhead_bytes=8 * MEBIBYTE, listed_sockets=30)


class Machine:
    """The memory and the sockets that a meter reads. free_bytes: free pages of the processors."""

    def __init__(self, usage: SocketUsage | None = MANY_PACKETS) -> None:
        self.unattributed_bytes = 5 << 30
        self.free_bytes = 0
        self.usage = usage
        self.unlisted = 0
        self.charged: int | None = 0
        self.seconds = 0.0
        self.counted = 0
        self.own_overhead = 0
        self.meter = PageFragmentMeter(
            lambda: self.unattributed_bytes, lambda: self.free_bytes, lambda: self.own_overhead, lambda: self.seconds
        )

    def count(self) -> SocketUsage | None:
        self.counted += 1
        return self.usage

    def measure(self, checks: int = 3) -> int:
        measured = [self.meter.measure(self.count, lambda _: self.unlisted, self.charged) for _ in range(checks)]
        assert measured[-1] is not None
        return measured[-1]


def is_exceeded(measured: int) -> bool:
    return bool(KernelUsage(page_fragment_bytes=measured).find_exceeded_limit())


def test_growth_counts_if_the_packets_could_have_caused_it():
    machine = Machine()
    assert machine.measure() == 0
    machine.unattributed_bytes += 2 << 30
    assert machine.measure() == 2 << 30
    assert "2048 MiB" in KernelUsage(page_fragment_bytes=2 << 30).find_exceeded_limit()
    assert not is_exceeded(PAGE_FRAGMENT_BYTES_MAX)


def test_single_check_is_not_enough():
    machine = Machine()
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    assert not is_exceeded(machine.measure(2))
    machine.usage = SocketUsage()
    assert not is_exceeded(machine.measure(1))
    machine.usage = MANY_PACKETS
    machine.unattributed_bytes += 2 << 30
    assert not is_exceeded(machine.measure(2))


@pytest.mark.parametrize(
    "usage",
    [SocketUsage(), SocketUsage(received_bytes=1 << 30, overhead_bytes=MEBIBYTE, listed_sockets=30)],
    ids=["no sockets", "much data"],
)
def test_growth_that_the_packets_could_not_have_caused_does_not_count(usage: SocketUsage):
    machine = Machine(usage)
    machine.measure()
    machine.unattributed_bytes += 4 << 30
    assert not is_exceeded(machine.measure())
    # Nor does it count later.
    machine.usage = MANY_PACKETS
    machine.unattributed_bytes += 100 * MEBIBYTE
    assert not is_exceeded(machine.measure())
    machine.unattributed_bytes += 2 << 30
    assert is_exceeded(machine.measure())


def test_free_pages_of_processors_do_not_count():
    machine = Machine()
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    machine.free_bytes += 2 << 30
    assert machine.measure() == 0


@pytest.mark.parametrize(
    ("unlisted", "charged_mebibytes", "exceeded"),
    [(1, 64, False), (2, 64, True), (40, 1, True), (10, 0, False), (40, 0, True)],
)
def test_memory_of_reset_connections_is_counted(unlisted: int, charged_mebibytes: int, exceeded: bool):
    machine = Machine(SocketUsage())
    machine.unlisted, machine.charged = unlisted, charged_mebibytes * MEBIBYTE
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    assert is_exceeded(machine.measure()) == exceeded


def test_sockets_of_the_runner_count():
    machine = Machine(SocketUsage())
    machine.own_overhead = 4 * MEBIBYTE
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    assert is_exceeded(machine.measure())


def test_small_packets_to_a_stalled_host_are_overhead():
    before = count_own_overhead_bytes()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0],
    ):
        client.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.send(bytes(100_000))
        bulk = count_own_overhead_bytes() - before
        assert 0 < bulk < MEBIBYTE // 4
        files = len(list_directory("/proc/self/fd"))
    assert len(list_directory("/proc/self/fd")) < files
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(100)]
        for client, _ in pairs:
            client.send(b"x")
        assert count_own_overhead_bytes() - before >= 100 * 768
        for pair in pairs:
            for one in pair:
                one.close()
    assert count_own_overhead_bytes() <= before


def test_all_charged_memory_counts_if_sockets_are_not_listed():
    machine = Machine(None)
    machine.charged = 4 * MEBIBYTE
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    assert is_exceeded(machine.measure())
    machine = Machine(None)
    machine.charged = None
    machine.measure()
    machine.unattributed_bytes += 2 << 30
    assert not is_exceeded(machine.measure())


def test_sockets_are_counted_once_a_second_without_growth():
    machine = Machine()
    machine.measure(10)
    assert machine.counted == 1
    machine.seconds += 1
    machine.measure(10)
    assert machine.counted == 2
    machine.unattributed_bytes += 2 << 30
    machine.measure(10)
    assert machine.counted == 12


def test_sizes_are_read_from_proc_files(tmp_path: Path):
    memory = tmp_path / "meminfo"
    memory.write_text(
        "MemTotal:       1000 kB\nMemFree:         300 kB\nMemAvailable:   700 kB\nBuffers: 10 kB\nCached:  200 kB\n"
        "AnonPages:       100 kB\nSlab:             50 kB\nPageTables:       5 kB\nVmallocUsed:     35 kB\n"
        "HugePages_Total:   7\n"
    )
    assert count_unattributed_bytes(memory) == 300 << 10
    zones = tmp_path / "zoneinfo"
    zones.write_text(
        "Node 0, zone Normal\n  pagesets\n    cpu: 0\n              count:    3\n    cpu: 1\n   count: 4\n"
    )
    assert count_free_bytes_of_processors(zones) % 7 == 0
    assert count_free_bytes_of_processors(zones) >= 7 * 4096
    assert count_unattributed_bytes(tmp_path / "none") is None
    assert count_free_bytes_of_processors(tmp_path / "none") == 0


def test_real_machine_shows_its_memory():
    assert count_unattributed_bytes() is not None
    assert count_free_bytes_of_processors() > 0
