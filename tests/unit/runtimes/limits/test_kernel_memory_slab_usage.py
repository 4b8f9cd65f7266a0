"""Slab memory is attributed to the sandboxes that may have caused it."""

from pathlib import Path

import pytest

from sandbox.model.fixed_limits import ANON_VMA_CHAIN_BYTES_MAX, DENTRIES_MAX, FREE_SLAB_BYTES_MAX, VMA_BYTES_MAX
from sandbox.runtimes.limits.kernel_memory import (
    GroupUsage,
    SlabMeter,
    SlabStatistics,
    SlabUsage,
    count_used_objects,
    reclaimable_free_slab_bytes_max,
)
from sandbox.runtimes.limits.usage_limits import KernelUsage

MEBIBYTE = 1 << 20
SLABS = """slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables ...
kmalloc-4k          10     30   4096    8    8 : tunables    0    0    0 : slabdata      4      4      0
vm_area_struct     100    121    192   21    1 : tunables    0    0    0 : slabdata      6      6      0
anon_vma_chain    5000   5120     64   64    1 : tunables    0    0    0 : slabdata     80     80      0
dentry             100  90000    192   21    1 : tunables    0    0    0 : slabdata   4286   4286      0
"""


SHARED_KINDS = tuple(kind for kind in SlabUsage._fields if kind != "vma_bytes_upper_bound")
"""Kinds of slab memory whose growth is divided among the sandboxes."""

CHARGED_KINDS = ("anon_vma_chain_bytes", "dentry_bytes", "vma_bytes", "vma_bytes_upper_bound")
"""Kinds of slab memory that consist of objects in use. All of it is charged to a control group."""


class SingleKindMeter:
    """Measures one kind of slab memory."""

    def __init__(self, machine: "FakeMachine") -> None:
        self._meter = SlabMeter(machine.measure, lambda: machine.now)
        self._kind = machine.kind

    def measure(
        self, charged: int | None, charged_to_other: int = 0, *, cpu: float = 0.0, other_cpu: float = 0.0
    ) -> int | None:
        usage = None if charged is None else GroupUsage(charged, cpu)
        found = self._meter.measure(usage, lambda: {"other": GroupUsage(charged_to_other, other_cpu)})
        assert found is None or sum(found) == getattr(found, self._kind)
        return None if found is None else getattr(found, self._kind)


class FakeMachine:
    def __init__(self, used_bytes: int | None = 0, kind: str = "unreclaimable_free_bytes") -> None:
        self.bytes, self.kind, self.now = used_bytes, kind, 100.0

    def measure(self) -> SlabUsage | None:
        return None if self.bytes is None else SlabUsage(0, 0)._replace(**{self.kind: self.bytes})

    def create_meter(self) -> SingleKindMeter:
        return SingleKindMeter(self)

    def grow(self, added_bytes: int) -> None:
        assert self.bytes is not None
        self.bytes += added_bytes
        self.now += 1


def test_unreclaimable_and_reclaimable_objects_are_counted_separately(tmp_path: Path):
    (tmp_path / "slabinfo").write_text(SLABS)
    for name, reclaimable in (("kmalloc-4k", "0"), ("dentry", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reclaim_account").write_text(f"{reclaimable}\n")
    (tmp_path / "dentry-state").write_text("1034086\t1022194\t45\t0\t322168\t0\n")
    found = SlabStatistics(tmp_path / "slabinfo").measure_usage(tmp_path, tmp_path / "dentry-state")
    assert found == SlabUsage(
        20 * 4096 + 21 * 192 + 120 * 64, 89900 * 192, 5000 * 64, 1034086 * 192, 100 * 192, 100 * 192
    )


def test_statistics_are_read_once_a_second_for_all_meters(tmp_path: Path):
    now = 100.0
    (tmp_path / "slabinfo").write_text(SLABS)
    statistics = SlabStatistics(tmp_path / "slabinfo", lambda: now)
    assert statistics.read() == {
        "kmalloc-4k": (10, 30, 4096),
        "vm_area_struct": (100, 121, 192),
        "anon_vma_chain": (5000, 5120, 64),
        "dentry": (100, 90000, 192),
    }
    (tmp_path / "slabinfo").write_text("")
    now = 100.9
    assert statistics.read()
    now = 101.0
    assert statistics.read() == {}


@pytest.mark.parametrize("kind", ["dentry", "dentries"])
def test_objects_of_a_kind_are_counted(tmp_path: Path, kind: str):
    (tmp_path / "slabinfo").write_text(SLABS)
    assert count_used_objects(kind, tmp_path / "slabinfo") == (100 if kind == "dentry" else None)
    assert count_used_objects(kind, tmp_path / "absent") is None


@pytest.mark.parametrize("state", ["", "\n", None])
def test_dentries_count_as_zero_if_their_number_is_unknown(tmp_path: Path, state: str | None):
    (tmp_path / "slabinfo").write_text(SLABS)
    if state is not None:
        (tmp_path / "dentry-state").write_text(state)
    found = SlabStatistics(tmp_path / "slabinfo").measure_usage(tmp_path, tmp_path / "dentry-state")
    assert found is not None
    assert found.dentry_bytes == 0


def test_unreadable_slabinfo_counts_as_zero(tmp_path: Path):
    assert SlabStatistics(tmp_path / "absent").measure_usage(tmp_path) is None
    assert FakeMachine(None).create_meter().measure(MEBIBYTE) is None
    assert FakeMachine().create_meter().measure(None) is None


@pytest.mark.parametrize("kind", SlabUsage._fields)
def test_growth_is_attributed_to_the_only_sandbox(kind: str):
    machine = FakeMachine(700 * MEBIBYTE, kind)
    meter = machine.create_meter()
    assert meter.measure(400 * MEBIBYTE) == 0
    machine.grow(300 * MEBIBYTE)
    charged = 350 * MEBIBYTE if kind in CHARGED_KINDS else 50 * MEBIBYTE
    assert meter.measure(charged) == 300 * MEBIBYTE
    machine.grow(-200 * MEBIBYTE)
    assert meter.measure(charged) == 100 * MEBIBYTE


def test_measurements_are_at_least_a_second_apart():
    machine = FakeMachine()
    meter = machine.create_meter()
    meter.measure(400 * MEBIBYTE)
    machine.grow(100 * MEBIBYTE)
    machine.now -= 0.1
    assert meter.measure(400 * MEBIBYTE) == 0
    machine.now += 0.1
    assert meter.measure(400 * MEBIBYTE) == 100 * MEBIBYTE


@pytest.mark.parametrize("first", [SlabUsage(0, 0), None])
def test_measurement_is_due_a_second_after_the_slabs_were_read(first: SlabUsage | None):
    now = 100.0
    meter = SlabMeter(lambda: first, lambda: now)
    assert meter.is_due()
    meter.measure(GroupUsage(MEBIBYTE), dict)
    now = 100.875
    assert not meter.is_due()
    meter.measure(GroupUsage(MEBIBYTE), dict)
    now = 102.0
    assert meter.is_due()


def test_slabs_are_read_again_immediately_if_the_first_reading_fails():
    """Slab memory that a sandbox causes before the first reading is not attributed to it."""
    readings: list[SlabUsage | None] = [None, SlabUsage(0, 0)]
    meter = SlabMeter(lambda: readings.pop(0), lambda: 100.0)
    assert meter.measure(GroupUsage(MEBIBYTE), dict) is None
    assert meter.measure(GroupUsage(MEBIBYTE), dict) == SlabUsage(0, 0)


def test_growth_is_attributed_in_proportion_to_usage():
    machine = FakeMachine()
    larger, smaller = machine.create_meter(), machine.create_meter()
    for _ in range(5):
        larger.measure(400 * MEBIBYTE, 40 * MEBIBYTE)
        smaller.measure(40 * MEBIBYTE, 400 * MEBIBYTE)
        machine.grow(300 * MEBIBYTE)
        larger_bytes = larger.measure(100 * MEBIBYTE, 40 * MEBIBYTE)
        smaller_bytes = smaller.measure(40 * MEBIBYTE, 400 * MEBIBYTE)
    assert larger_bytes is not None
    assert smaller_bytes is not None
    assert larger_bytes > 1300 * MEBIBYTE
    assert smaller_bytes < 150 * MEBIBYTE


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_growth_is_attributed_to_a_running_sandbox_and_not_to_an_idle_one(kind: str):
    machine = FakeMachine(kind=kind)
    busy, idle = machine.create_meter(), machine.create_meter()
    busy_bytes = idle_bytes = None
    for second in range(6):
        busy_bytes = busy.measure(300 * MEBIBYTE, 900 * MEBIBYTE, cpu=100.0 + second, other_cpu=500.0)
        idle_bytes = idle.measure(900 * MEBIBYTE, 300 * MEBIBYTE, cpu=500.0, other_cpu=100.0 + second)
        machine.grow(40 * MEBIBYTE)
    assert busy_bytes is not None
    assert idle_bytes is not None
    assert busy_bytes > 199 * MEBIBYTE
    assert idle_bytes < MEBIBYTE


def test_growth_in_mappings_is_attributed_to_an_idle_sandbox_too():
    """The sandbox's own mappings are counted afterwards, so that another, busy sandbox cannot hide them."""
    machine = FakeMachine(kind="vma_bytes_upper_bound")
    idle = machine.create_meter()
    idle.measure(900 * MEBIBYTE, 300 * MEBIBYTE, cpu=500.0, other_cpu=100.0)
    machine.grow(250 * MEBIBYTE)
    assert idle.measure(900 * MEBIBYTE, 300 * MEBIBYTE, cpu=500.0, other_cpu=101.0) == 250 * MEBIBYTE


def test_growth_is_attributed_to_all_running_sandboxes():
    machine = FakeMachine()
    meter = machine.create_meter()
    for second in range(6):
        found = meter.measure(300 * MEBIBYTE, 300 * MEBIBYTE, cpu=second, other_cpu=7.0 + second)
        machine.grow(40 * MEBIBYTE)
    assert found == 100 * MEBIBYTE


def test_host_growth_alone_is_not_a_violation_by_a_small_sandbox():
    machine = FakeMachine()
    meter = machine.create_meter()
    meter.measure(30 * MEBIBYTE)
    machine.grow(4096 * MEBIBYTE)
    count = meter.measure(30 * MEBIBYTE)
    assert count == 480 * MEBIBYTE
    assert not KernelUsage(unreclaimable_free_slab_bytes=count).find_exceeded_limit()


def test_free_slab_memory_above_the_limit_is_a_violation():
    assert not KernelUsage(unreclaimable_free_slab_bytes=FREE_SLAB_BYTES_MAX).find_exceeded_limit()
    assert "1025 MiB" in KernelUsage(unreclaimable_free_slab_bytes=FREE_SLAB_BYTES_MAX + MEBIBYTE).find_exceeded_limit()


def test_reclaimable_slab_memory_above_the_limit_is_a_violation():
    limit = reclaimable_free_slab_bytes_max()
    assert limit >= FREE_SLAB_BYTES_MAX
    assert not KernelUsage(
        reclaimable_free_slab_bytes=limit, reclaimable_free_slab_bytes_max=limit
    ).find_exceeded_limit()
    assert (
        "inodes"
        in KernelUsage(
            reclaimable_free_slab_bytes=limit + 1, reclaimable_free_slab_bytes_max=limit
        ).find_exceeded_limit()
    )


@pytest.mark.parametrize("kind", CHARGED_KINDS)
def test_objects_in_use_that_are_not_charged_to_the_sandbox_are_not_attributed(kind: str):
    machine = FakeMachine(kind=kind)
    meter = machine.create_meter()
    meter.measure(400 * MEBIBYTE)
    machine.grow(300 * MEBIBYTE)
    assert meter.measure(90 * MEBIBYTE) == 90 * MEBIBYTE


@pytest.mark.parametrize("kind", ["anon_vma_chain_bytes", "vma_bytes"])
def test_mappings_of_another_sandbox_are_not_attributed_to_a_sandbox_with_cached_inodes(kind: str):
    """A program that creates mappings slowly must not end a busy task that has read many files."""
    machine = FakeMachine(kind=kind)
    victim, attacker = (SlabMeter(machine.measure, lambda: machine.now) for _ in range(2))
    charged = GroupUsage(1024 * MEBIBYTE, 0.0, reclaimable_bytes=1000 * MEBIBYTE)
    idle = GroupUsage(10 * MEBIBYTE)
    victim.measure(charged, lambda: {"attacker": idle})
    attacker.measure(idle, lambda: {"victim": charged})
    machine.grow(600 * MEBIBYTE)
    charged, grown = charged._replace(cpu_seconds=2.0), GroupUsage(610 * MEBIBYTE, 0.1)
    found = victim.measure(charged, lambda: {"attacker": grown})
    assert getattr(found, kind) == 24 * MEBIBYTE


@pytest.mark.parametrize("kind", ["anon_vma_chain_bytes", "vma_bytes"])
def test_cached_inodes_do_not_hide_mappings(kind: str):
    machine = FakeMachine(kind=kind)
    meter = SlabMeter(machine.measure, lambda: machine.now)
    meter.measure(GroupUsage(10 * MEBIBYTE), dict)
    machine.grow(300 * MEBIBYTE)
    found = meter.measure(GroupUsage(1310 * MEBIBYTE, 1.0, reclaimable_bytes=1000 * MEBIBYTE), dict)
    assert getattr(found, kind) == 300 * MEBIBYTE


def test_mapping_links_above_the_limit_are_a_violation():
    assert not KernelUsage(anon_vma_chain_bytes=ANON_VMA_CHAIN_BYTES_MAX).find_exceeded_limit()
    assert "97 MiB" in KernelUsage(anon_vma_chain_bytes=ANON_VMA_CHAIN_BYTES_MAX + MEBIBYTE).find_exceeded_limit()


def test_mappings_above_the_limit_are_a_violation():
    assert not KernelUsage(vma_bytes=VMA_BYTES_MAX).find_exceeded_limit()
    assert "161 MiB" in KernelUsage(vma_bytes=VMA_BYTES_MAX + MEBIBYTE).find_exceeded_limit()


def test_more_dentries_than_the_limit_are_a_violation():
    assert not KernelUsage(dentries=DENTRIES_MAX).find_exceeded_limit()
    assert "file names" in KernelUsage(dentries=DENTRIES_MAX + 1).find_exceeded_limit()
