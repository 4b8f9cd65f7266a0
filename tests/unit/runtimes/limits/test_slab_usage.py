"""Kernel memory that few objects keep from the machine is put down to the sandboxes that can have taken it."""

from pathlib import Path

from sandbox.interfaces.runtime import KernelUsage
from sandbox.model.limits import IDLE_SLAB_BYTES_MAX
from sandbox.runtimes.limits.slab_usage import IdleSlabMeter, count_idle_bytes

MEBIBYTE = 1 << 20
SLABS = """slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables ...
kmalloc-4k          10     30   4096    8    8 : tunables    0    0    0 : slabdata      4      4      0
vm_area_struct     100    121    192   21    1 : tunables    0    0    0 : slabdata      6      6      0
dentry             100  90000    192   21    1 : tunables    0    0    0 : slabdata   4286   4286      0
"""


class Machine:
    def __init__(self, idle: int | None = 0) -> None:
        self.idle, self.now = idle, 100.0

    def slabs(self) -> IdleSlabMeter:
        return IdleSlabMeter(lambda: self.idle, lambda: self.now)

    def comes(self, more: int) -> None:
        assert self.idle is not None
        self.idle += more
        self.now += 1


def test_free_objects_of_slabs_count_but_those_that_the_kernel_takes_back(tmp_path: Path):
    (tmp_path / "slabinfo").write_text(SLABS)
    for name, reclaimable in (("kmalloc-4k", "0"), ("dentry", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reclaim_account").write_text(f"{reclaimable}\n")
    assert count_idle_bytes(tmp_path / "slabinfo", tmp_path) == 20 * 4096 + 21 * 192


def test_where_only_root_may_look_nothing_is_counted(tmp_path: Path):
    assert count_idle_bytes(tmp_path / "absent", tmp_path) is None
    assert Machine(None).slabs().count(MEBIBYTE, lambda: MEBIBYTE) is None
    assert Machine().slabs().count(None, lambda: MEBIBYTE) is None


def test_what_was_there_before_is_nobodys_and_what_comes_to_the_only_sandbox_is_its_own():
    machine = Machine(700 * MEBIBYTE)
    slabs = machine.slabs()
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 0
    machine.comes(300 * MEBIBYTE)
    assert slabs.count(50 * MEBIBYTE, lambda: 50 * MEBIBYTE) == 300 * MEBIBYTE
    machine.comes(-200 * MEBIBYTE)
    assert slabs.count(50 * MEBIBYTE, lambda: 50 * MEBIBYTE) == 100 * MEBIBYTE


def test_two_looks_are_a_second_apart():
    machine = Machine()
    slabs = machine.slabs()
    slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE)
    machine.comes(100 * MEBIBYTE)
    machine.now -= 0.1
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 0
    machine.now += 0.1
    assert slabs.count(400 * MEBIBYTE, lambda: 400 * MEBIBYTE) == 100 * MEBIBYTE


def test_of_several_sandboxes_each_has_the_part_that_it_can_have_taken():
    machine = Machine()
    greedy, modest = machine.slabs(), machine.slabs()
    for _ in range(5):
        greedy.count(400 * MEBIBYTE, lambda: 440 * MEBIBYTE)
        modest.count(40 * MEBIBYTE, lambda: 440 * MEBIBYTE)
        machine.comes(300 * MEBIBYTE)
        taken = greedy.count(100 * MEBIBYTE, lambda: 140 * MEBIBYTE)
        beside = modest.count(40 * MEBIBYTE, lambda: 440 * MEBIBYTE)
    assert taken is not None
    assert beside is not None
    assert taken > 1300 * MEBIBYTE
    assert beside < 150 * MEBIBYTE


def test_a_sandbox_that_the_kernel_held_little_for_is_not_over_the_bound_for_what_the_host_frees():
    machine = Machine()
    slabs = machine.slabs()
    slabs.count(30 * MEBIBYTE, lambda: 30 * MEBIBYTE)
    machine.comes(4096 * MEBIBYTE)
    count = slabs.count(30 * MEBIBYTE, lambda: 30 * MEBIBYTE)
    assert count == 480 * MEBIBYTE
    assert not KernelUsage(idle_slab_bytes=count).find_violation()


def test_over_the_bound_the_sandbox_ends():
    assert not KernelUsage(idle_slab_bytes=IDLE_SLAB_BYTES_MAX).find_violation()
    assert "1025 MiB" in KernelUsage(idle_slab_bytes=IDLE_SLAB_BYTES_MAX + MEBIBYTE).find_violation()
