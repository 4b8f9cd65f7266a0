"""Time for which a sandbox holds locks that the machine needs."""

import os
import threading
import time
from pathlib import Path

import pytest

from doubles.deployment import wait_until
from sandbox.model.fixed_limits import HOST_INODE_LOCK_SECONDS_MAX, KERNEL_LOCK_HOLD_SECONDS_MAX
from sandbox.runtimes.limits.kernel_time import (
    NESTED_EPOLL_LOCK,
    NETWORK_LOCK,
    TERMINAL_LOCK,
    HostInodeLockMeter,
    KernelLock,
    LockMeter,
    LockProbe,
)
from sandbox.runtimes.limits.usage_limits import KernelUsage

_PTMX_OPEN_STACK = "[<0>] ptmx_open+0x45/0x1b0\n[<0>] do_dentry_open+0x2b1/0x470\n"
_PTMX_MUTEX_LOCK_STACK = "[<0>] __mutex_lock.constprop.0+0x392/0xa70\n" + _PTMX_OPEN_STACK


class LockHarness:
    """A probe that waits for the lock, a clock, and the threads of a sandbox."""

    def __init__(self, proc: Path) -> None:
        self.waited_seconds, self.now, self.lock = 10.0, 100.0, TERMINAL_LOCK
        self._proc = proc
        self._meter: LockMeter | None = None

    def add_thread(self, number: int, state: str, stack: str) -> None:
        directory = self._proc / str(number)
        directory.mkdir(exist_ok=True)
        (directory / "stat").write_text(f"{number} (a) b) {state} 1 1 1")
        (directory / "stack").write_text(stack)

    def measure(self, seconds: int) -> float:
        """Measure once per second for this many seconds. Return the last measured time."""
        if self._meter is None:
            self._meter = LockMeter(self.lock, lambda: self.waited_seconds, lambda: self.now, self._proc)
        measured = 0.0
        for _ in range(seconds):
            self.now += 1
            measured = self._meter.measure(lambda: [7, 8, 9])
        return measured


@pytest.fixture
def lock(tmp_path: Path) -> LockHarness:
    return LockHarness(tmp_path)


@pytest.mark.parametrize(
    ("state", "stack", "seconds"),
    [
        ("R", _PTMX_OPEN_STACK, 3.0),
        ("R", _PTMX_MUTEX_LOCK_STACK, 3.0),
        ("D", "[<0>] balance_dirty_pages+0x1/0x2\n" + _PTMX_OPEN_STACK, 3.0),
        ("R", "[<0>] tty_release+0x1/0x2\n", 3.0),
        ("D", _PTMX_MUTEX_LOCK_STACK, 0.0),
        ("D", _PTMX_OPEN_STACK, 0.0),
        ("R", "[<0>] t_start+0x16/0x40\n[<0>] seq_read_iter+0xe6/0x480\n", 3.0),
        ("R", "[<0>] do_sys_openat2+0x1/0x2\n", 0.0),
    ],
    ids=[
        "holds",
        "was given the lock",
        "holds and waits for something else",
        "closes",
        "waits",
        "waits without the lock's functions",
        "lists drivers",
        "opens a file",
    ],
)
def test_time_counts_while_a_thread_may_hold_the_lock(lock: LockHarness, state: str, stack: str, seconds: float):
    lock.add_thread(8, state, stack)
    assert lock.measure(3) == seconds


_PAGE_FAULT_FRAMES = "[<0>] shmem_fault+0x2a9/0x390\n[<0>] handle_mm_fault+0xd0/0x310\n"
_DEV_IFCONF_PAGE_FAULT_STACK = _PAGE_FAULT_FRAMES + "[<0>] inet_gifconf+0xf4/0x240\n[<0>] dev_ifconf+0xc1/0x180\n"
_IP_SETSOCKOPT_STACK = (
    "[<0>] __lock_sock+0x6f/0xc0\n[<0>] sockopt_lock_sock+0x62/0x70\n[<0>] do_ip_setsockopt+0x7a/0x1680\n"
)
_RTNETLINK_STACK = (
    "[<0>] rtnetlink_rcv_msg+0xd9/0x390\n[<0>] netlink_rcv_skb+0x4b/0x100\n[<0>] netlink_unicast+0x27e/0x3b0\n"
)
_RTNL_MUTEX_LOCK_STACK = (
    "[<0>] __mutex_lock.constprop.0+0x392/0xa70\n[<0>] rtnl_lock+0x15/0x20\n" + _IP_SETSOCKOPT_STACK
)


@pytest.mark.parametrize(
    ("state", "stack", "seconds"),
    [
        ("D", _DEV_IFCONF_PAGE_FAULT_STACK, 3.0),
        ("S", _IP_SETSOCKOPT_STACK, 3.0),
        ("R", _RTNETLINK_STACK, 3.0),
        ("R", _RTNL_MUTEX_LOCK_STACK, 3.0),
        ("D", _RTNETLINK_STACK, 0.0),
        ("D", "[<0>] rtnl_lock+0x15/0x20\n" + _IP_SETSOCKOPT_STACK, 0.0),
        ("D", _RTNL_MUTEX_LOCK_STACK, 0.0),
    ],
    ids=[
        *("waits for its memory", "waits for its socket", "asks for a device", "was given the lock"),
        *("waits for the lock to ask", "waits for the lock to join", "waits for the lock"),
    ],
)
def test_time_counts_while_a_thread_may_hold_the_lock_for_network_devices(
    lock: LockHarness, state: str, stack: str, seconds: float
):
    lock.lock = NETWORK_LOCK
    lock.add_thread(8, state, stack)
    assert lock.measure(3) == seconds


_EPOLL_CTL_STACK = "[<0>] do_epoll_ctl+0x6d9/0xeb0\n[<0>] __x64_sys_epoll_ctl+0x60/0xa0\n"
_EPOLL_LOOP_CHECK_STACK = "[<0>] ep_loop_check_proc+0x2c/0x140\n" + _EPOLL_CTL_STACK
_EPOLL_SEND_EVENTS_STACK = "[<0>] ep_send_events+0x12a/0x250\n[<0>] do_epoll_wait+0x1a4/0x5a0\n"
_EPOLL_WAIT_STACK = "[<0>] do_epoll_wait+0x479/0x5a0\n[<0>] __x64_sys_epoll_wait+0x5a/0x120\n"


@pytest.mark.parametrize(
    ("state", "stack", "seconds"),
    [
        ("D", _EPOLL_LOOP_CHECK_STACK, 3.0),
        ("D", "[<0>] __mutex_lock.constprop.0+0x392/0xa70\n" + _EPOLL_LOOP_CHECK_STACK, 3.0),
        ("R", _EPOLL_CTL_STACK, 3.0),
        ("D", _PAGE_FAULT_FRAMES + _EPOLL_SEND_EVENTS_STACK, 0.0),
        ("R", _EPOLL_SEND_EVENTS_STACK, 0.0),
        ("D", _EPOLL_CTL_STACK, 0.0),
        ("D", _EPOLL_SEND_EVENTS_STACK, 0.0),
        ("S", _EPOLL_WAIT_STACK, 0.0),
    ],
    ids=[
        *("waits for an inner instance", "waits in a mutex function", "was given the lock", "waits for its memory"),
        *("copies events", "waits for the lock", "waits for its own instance", "waits for events"),
    ],
)
def test_time_counts_while_a_thread_may_hold_the_lock_for_nested_epoll_instances(
    lock: LockHarness, state: str, stack: str, seconds: float
):
    lock.lock = NESTED_EPOLL_LOCK
    lock.add_thread(8, state, stack)
    assert lock.measure(3) == seconds


def test_time_does_not_count_while_the_lock_is_free(lock: LockHarness):
    lock.add_thread(8, "R", _PTMX_OPEN_STACK)
    lock.waited_seconds = 0.9
    assert lock.measure(3) == 0.0


def test_time_decreases_slowly_while_the_lock_is_free(lock: LockHarness):
    lock.add_thread(8, "R", _PTMX_OPEN_STACK)
    assert lock.measure(3) == 3.0
    lock.waited_seconds = 0.0
    assert lock.measure(4) == 2.0
    assert lock.measure(9) == 0.0


def test_time_above_the_limit_is_a_violation():
    assert not KernelUsage(terminal_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX).find_exceeded_limit()
    assert "terminals" in KernelUsage(terminal_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX + 0.1).find_exceeded_limit()


def test_late_measurement_counts_only_the_time_that_the_probe_has_waited_beyond_one_second(lock: LockHarness):
    lock.add_thread(8, "R", _PTMX_OPEN_STACK)
    assert lock.measure(1) == 1.0
    lock.now += 6
    lock.waited_seconds = 2.5
    assert lock.measure(1) == 2.5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read the stacks of threads")
def test_probe_reports_how_long_it_has_waited_in_the_kernel():
    reading, writing = os.pipe()
    probe = LockProbe(KernelLock("lock", lambda: os.read(reading, 1), ("pipe_read",)))
    assert probe.measure_wait() == 0.0
    time.sleep(1.2)
    assert 1.2 <= probe.measure_wait() < 60
    os.write(writing, b"x")
    wait_until(lambda: probe.measure_wait() == 0.0)
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_probe_that_waits_for_anything_but_the_lock_reports_no_wait():
    may_continue = threading.Event()
    probe = LockProbe(KernelLock("lock", may_continue.wait, ("mutex_lock",)))
    assert probe.measure_wait() == 0.0
    time.sleep(1.2)
    assert probe.measure_wait() == 0.0
    may_continue.set()


@pytest.mark.parametrize("lock", [TERMINAL_LOCK, NETWORK_LOCK, NESTED_EPOLL_LOCK], ids=lambda lock: lock.name)
def test_probe_takes_the_lock_of_this_machine(lock: KernelLock):
    lock.acquire_and_release()
    probe = LockProbe(lock)
    probe.measure_wait()
    time.sleep(0.5)
    assert probe.measure_wait() == 0.0


_OVL_ITERATE_PAGE_FAULT_STACK = _PAGE_FAULT_FRAMES + "[<0>] iterate_dir+0xba/0x2a0\n[<0>] ovl_iterate+0x182/0x320\n"
_ITERATE_DIR_PAGE_FAULT_STACK = _PAGE_FAULT_FRAMES + "[<0>] filldir64+0xc5/0x190\n[<0>] iterate_dir+0xba/0x2a0\n"
_READ_FRAMES = "[<0>] backing_file_read_iter+0x179/0x1d0\n[<0>] ovl_read_iter+0xa1/0xb0\n"
_DIRECT_READ_PAGE_FAULT_STACK = _PAGE_FAULT_FRAMES + "[<0>] iomap_dio_rw+0xe/0x40\n" + _READ_FRAMES
_DIRECT_READ_OF_DISK_STACK = _PAGE_FAULT_FRAMES + "[<0>] iomap_dio_rw+0xe/0x40\n[<0>] ext4_file_read_iter+0x18b/0x240\n"
_MEMORY_LOCK_FRAMES = "[<0>] lock_mm_and_find_vma+0x1/0x2\n[<0>] exc_page_fault+0x1/0x2\n[<0>] filldir64+0x1/0x2\n"
_GUP_FRAMES = "[<0>] __gup_longterm_locked+0x1/0x2\n[<0>] iomap_dio_bio_iter+0x1/0x2\n"
_RECLAIM_FRAMES = (
    "[<0>] try_to_free_mem_cgroup_pages+0x1/0x2\n[<0>] try_charge_memcg+0x1/0x2\n[<0>] __d_alloc+0x1/0x2\n"
)
_LOOKUP_FRAMES = "[<0>] __lookup_slow+0x1/0x2\n"
_OVL_LOOKUP_FRAMES = "[<0>] lookup_one_unlocked+0x1/0x2\n[<0>] ovl_lookup+0x1/0x2\n" + _LOOKUP_FRAMES
_OVL_ITERATE_STACK = "[<0>] iterate_dir+0xba/0x2a0\n[<0>] ovl_iterate+0x182/0x320\n"


def measure_listings(lock: LockHarness, tmp_path: Path, seconds: float) -> list[float]:
    """Measure four times a second; return the times."""
    meter, times = HostInodeLockMeter(lambda: lock.now, tmp_path), []
    for _ in range(int(4 * seconds)):
        times.append(meter.measure(lambda: [7, 8, 9]))
        lock.now += 0.25
    return times


@pytest.mark.parametrize(
    ("stack", "seconds"),
    [
        (_OVL_ITERATE_PAGE_FAULT_STACK, 3.0),
        (_DIRECT_READ_PAGE_FAULT_STACK, 3.0),
        (_MEMORY_LOCK_FRAMES + _OVL_ITERATE_STACK, 3.0),
        (_GUP_FRAMES + _READ_FRAMES, 3.0),
        (_RECLAIM_FRAMES + _OVL_LOOKUP_FRAMES, 3.0),
        (_RECLAIM_FRAMES + _OVL_ITERATE_STACK, 3.0),
        (_RECLAIM_FRAMES + _READ_FRAMES, 0.0),
        (_RECLAIM_FRAMES + _LOOKUP_FRAMES, 0.0),
        (_OVL_LOOKUP_FRAMES, 0.0),
        (_ITERATE_DIR_PAGE_FAULT_STACK, 0.0),
        (_DIRECT_READ_OF_DISK_STACK, 0.0),
        (_PAGE_FAULT_FRAMES + _READ_FRAMES, 0.0),
        (_OVL_ITERATE_STACK, 0.0),
    ],
    ids=[
        "listing",
        "direct read",
        "listing that waits for the lock of its memory",
        "direct read that waits for the lock of its memory",
        "lookup that waits for reclaim",
        "listing that waits for reclaim",
        "cached read that waits for reclaim",
        "lookup on the disk that waits for reclaim",
        "lookup that does not wait",
        "listing of the disk",
        "direct read of the disk",
        "cached read",
        "does not wait",
    ],
)
def test_time_counts_while_a_thread_with_the_lock_of_a_host_file_waits_for_its_memory(
    lock: LockHarness, tmp_path: Path, stack: str, seconds: float
):
    lock.add_thread(8, "D", stack)
    assert measure_listings(lock, tmp_path, 4)[-1] == seconds


def test_measured_time_is_zero_after_the_listing_ends(lock: LockHarness, tmp_path: Path):
    meter = HostInodeLockMeter(lambda: lock.now, tmp_path)
    lock.add_thread(8, "D", _OVL_ITERATE_PAGE_FAULT_STACK)
    meter.measure(lambda: [8])
    lock.now += 3
    assert meter.measure(lambda: [8]) == 3.0
    lock.now += 1
    lock.add_thread(8, "R", "")
    assert meter.measure(lambda: [8]) == 0.0


def test_locks_and_listings_above_the_limits_are_violations():
    for usage in (
        KernelUsage(network_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX),
        KernelUsage(nested_epoll_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX),
        KernelUsage(host_inode_lock_seconds=HOST_INODE_LOCK_SECONDS_MAX),
    ):
        assert not usage.find_exceeded_limit()
    network = KernelUsage(network_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX + 0.1).find_exceeded_limit()
    assert "network devices" in network
    epoll = KernelUsage(nested_epoll_lock_seconds=KERNEL_LOCK_HOLD_SECONDS_MAX + 0.1).find_exceeded_limit()
    assert "nested epoll instances" in epoll
    assert (
        "listed or searched a directory"
        in KernelUsage(host_inode_lock_seconds=HOST_INODE_LOCK_SECONDS_MAX + 0.1).find_exceeded_limit()
    )
