"""Idle slab memory is attributed to the sandboxes that may have caused it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.model.limits import IDLE_SLAB_BYTES_MAX
from sandbox.runtimes.limits.kernel_watch import KernelUsage
from sandbox.runtimes.limits.slab_usage import IdleBytes, IdleSlabMeter, count_idle_bytes, idle_cache_bytes_max

MEBIBYTE = 1 << 20
SLABS = """slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables ...
kmalloc-4k          10     30   4096    8    8 : tunables    0    0    0 : slabdata      4      4      0
vm_area_struct     100    121    192   21    1 : tunables    0    0    0 : slabdata      6      6      0
dentry             100  90000    192   21    1 : tunables    0    0    0 : slabdata   4286   4286      0
"""


class FakeMeter:
    """Counts the idle bytes of one kind."""

    def __init__(self, machine: "FakeSlabs") -> None:
        self._meter = IdleSlabMeter(machine.count, lambda: machine.now)
        self._kind = machine.kind

    def count(self, charged: int | None, charged_to_all: Callable[[], int]) -> int | None:
        found = self._meter.count(charged, charged_to_all)
        assert found is None or sum(found) == getattr(found, self._kind)
        return None if found is None else getattr(found, self._kind)


class FakeSlabs:
    def __init__(self, idle: int | None = 0, kind: str = "others") -> None:
        self.idle, self.kind, self.now = idle, kind, 100.0

    def count(self) -> IdleBytes | None:
        return None if self.idle is None else IdleBytes(0, 0)._replace(**{self.kind: self.idle})

    def slabs(self) -> FakeMeter:
        return FakeMeter(self)

    def grow(self, added_bytes: int) -> None:
        assert self.idle is not None
        self.idle += added_bytes
        self.now += 1


def test_idle_objects_and_reclaimable_ones_are_counted_separately(tmp_path: Path):
    (tmp_path / "slabinfo").write_text(SLABS)
    for name, reclaimable in (("kmalloc-4k", "0"), ("dentry", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reclaim_account").write_text(f"{reclaimable}\n")
    assert count_idle_bytes(tmp_path / "slabinfo", tmp_path) == IdleBytes(20 * 4096 + 21 * 192, 89900 * 192)


def test_unreadable_slabinfo_counts_as_zero(tmp_path: Path):
    assert count_idle_bytes(tmp_path / "absent", tmp_path) is None
    assert FakeSlabs(None).slabs().count(MEBIBYTE, lambda: MEBIBYTE) is None
    assert FakeSlabs().slabs().count(None, lambda: MEBIBYTE) is None


@pytest.mark.parametrize("kind", IdleBytes._fields)
def test_growth_is_attributed_to_the_only_sandbox(kind: str):
    machine = FakeSlabs(700 * MEBIBYTE, kind)
    slabs = machine.slabs()
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 0
    machine.grow(300 * MEBIBYTE)
    assert slabs.count(50 * MEBIBYTE, lambda: 50 * MEBIBYTE) == 300 * MEBIBYTE
    machine.grow(-200 * MEBIBYTE)
    assert slabs.count(50 * MEBIBYTE, lambda: 50 * MEBIBYTE) == 100 * MEBIBYTE


def test_measurements_are_at_least_a_second_apart():
    machine = FakeSlabs()
    slabs = machine.slabs()
    slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE)
    machine.grow(100 * MEBIBYTE)
    machine.now -= 0.1
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 0
    machine.now += 0.1
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 100 * MEBIBYTE


def test_growth_is_attributed_in_proportion_to_usage():
    machine = FakeSlabs()
    larger, smaller = machine.slabs(), machine.slabs()
    for _ in range(5):
        larger.count(400 * MEBIBYTE, lambda: 440 * MEBIBYTE)
        smaller.count(40 * MEBIBYTE, lambda: 440 * MEBIBYTE)
        machine.grow(300 * MEBIBYTE)
        larger_bytes = larger.count(100 * MEBIBYTE, lambda: 140 * MEBIBYTE)
        smaller_bytes = smaller.count(40 * MEBIBYTE, lambda: 440 * MEBIBYTE)
    assert larger_bytes is not None
    assert smaller_bytes is not None
    assert larger_bytes > 1300 * MEBIBYTE
    assert smaller_bytes < 150 * MEBIBYTE


def test_small_sandbox_is_not_charged_for_host_growth():
    machine = FakeSlabs()
    slabs = machine.slabs()
    slabs.count(30 * MEBIBYTE, lambda: 30 * MEBIBYTE)
    machine.grow(4096 * MEBIBYTE)
    count = slabs.count(30 * MEBIBYTE, lambda: 30 * MEBIBYTE)
    assert count == 480 * MEBIBYTE
    assert not KernelUsage(idle_slab_bytes=count).find_violation()


def test_excess_is_a_violation():
    assert not KernelUsage(idle_slab_bytes=IDLE_SLAB_BYTES_MAX).find_violation()
    assert "1025 MiB" in KernelUsage(idle_slab_bytes=IDLE_SLAB_BYTES_MAX + MEBIBYTE).find_violation()


def test_excess_of_idle_cached_objects_is_a_violation():
    limit = idle_cache_bytes_max()
    assert limit >= IDLE_SLAB_BYTES_MAX
    assert not KernelUsage(idle_cache_bytes=limit, idle_cache_bytes_max=limit).find_violation()
    assert "inodes" in KernelUsage(idle_cache_bytes=limit + 1, idle_cache_bytes_max=limit).find_violation()
