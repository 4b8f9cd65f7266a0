"""The extents and directories on the disk of a sandbox are counted."""

import os
import struct
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import CACHED_EXTENTS_MAX, DISK_DIRECTORIES_MAX
from sandbox.runtimes.limits.kernel_memory import CachedExtentMeter, DirectoryMeter, SlabStatistics
from sandbox.runtimes.limits.usage_limits import KernelUsage


class FakeDisk:
    """Fake statistics of the machine and of an ext4 disk that has the device number of /proc."""

    def __init__(self, directory: Path) -> None:
        self.slabs, self.devices, self.statistics = (directory / name for name in ("slabs", "devices", "ext4"))
        device = Path("/proc").stat().st_dev
        self.devices.mkdir()
        (self.devices / f"{os.major(device)}:{os.minor(device)}").symlink_to(directory / "loop7")
        (self.statistics / "loop7").mkdir(parents=True)
        self.now = 0.0
        slabs = SlabStatistics(self.slabs, lambda: self.now)
        self.capacity = directory / "total_objects"
        files = (self.devices, self.statistics)
        self.meter = CachedExtentMeter(Path("/proc"), slabs, *files, lambda: self.now, self.capacity)

    def count(self, of_machine: int, of_disk: int) -> int | None:
        self.slabs.write_text(
            f"version\n# name\ndentry 100 200 192 21 1 :\nextent_status      {of_machine} {of_machine} 40 102 1 :\n"
        )
        report = f"stats:\n  {of_disk} objects\n  7 reclaimable objects\naverage:\n  5 shrunk objects\n"
        (self.statistics / "loop7/es_shrinker_info").write_text(report)
        return self.meter.count()


def test_cached_extents_of_the_disk_are_counted_once_a_second(tmp_path: Path):
    disk = FakeDisk(tmp_path)
    assert disk.count(9_000_000, 8_000_000) == 8_000_000
    assert not disk.meter.is_due()
    assert disk.count(9_000_000, 5) == 8_000_000
    disk.now = 1.0
    assert disk.meter.is_due()
    assert disk.count(9_000_000, 5) == 5


def test_statistics_of_the_disk_are_not_read_while_the_machine_has_few_extents(tmp_path: Path):
    disk = FakeDisk(tmp_path)
    assert disk.count(CACHED_EXTENTS_MAX, 8_000_000) == 0


def test_slab_statistics_are_not_read_while_the_kernel_has_memory_for_few_extents(tmp_path: Path):
    disk = FakeDisk(tmp_path)
    disk.capacity.write_text(f"{CACHED_EXTENTS_MAX} N0={CACHED_EXTENTS_MAX}\n")
    assert disk.count(9_000_000, 8_000_000) == 0
    disk.now = 1.0
    disk.capacity.write_text(f"{CACHED_EXTENTS_MAX + 1} N0={CACHED_EXTENTS_MAX + 1}\n")
    assert disk.count(9_000_000, 8_000_000) == 8_000_000


def test_cached_extent_count_of_a_file_system_that_others_use_is_unknown(tmp_path: Path):
    assert CachedExtentMeter(tmp_path, SlabStatistics()).count() is None
    assert CachedExtentMeter(tmp_path / "missing", SlabStatistics()).count() is None
    assert (
        CachedExtentMeter(Path("/proc"), SlabStatistics(tmp_path / "missing"), capacity_file=tmp_path).count() is None
    )


def test_more_cached_extents_than_the_limit_are_a_violation():
    assert KernelUsage(cached_extents=CACHED_EXTENTS_MAX).find_exceeded_limit() == ""
    assert "extents and holes" in KernelUsage(cached_extents=CACHED_EXTENTS_MAX + 1).find_exceeded_limit()


GROUP_BLOCKS = 32768


class FakeBlockDevice:
    """Fake superblock and descriptors of an ext4 disk that has the device number of /proc."""

    def __init__(self, directory: Path) -> None:
        self.device = directory / "loop7"
        number = Path("/proc").stat().st_dev
        devices = directory / "devices"
        devices.mkdir()
        (devices / f"{os.major(number)}:{os.minor(number)}").symlink_to(self.device)
        self.meter = DirectoryMeter(Path("/proc"), devices, directory, files_min=-1)

    def count(
        self, *directories: int, features: int = 0x80, magic: int = 0xEF53, block_size: int = 2, size: int = 64
    ) -> int | None:
        fields = {4: len(directories) * GROUP_BLOCKS - 5, 20: int(block_size == 0), 24: block_size, 32: GROUP_BLOCKS}
        superblock = bytearray(1024)
        for offset, value in {**fields, 96: features}.items():
            struct.pack_into("<I", superblock, offset, value)
        struct.pack_into("<H", superblock, 56, magic)
        struct.pack_into("<H", superblock, 254, size)
        groups = bytearray()
        for number in directories:
            group = bytearray(b"\xff" * (64 if features & 0x80 else 32))
            struct.pack_into("<H", group, 16, number & 0xFFFF)
            if features & 0x80:
                struct.pack_into("<H", group, 48, number >> 16)
            groups += group
        start = 2048 if block_size == 0 else 1024 << block_size
        self.device.write_bytes((bytes(1024) + superblock).ljust(start, b"\xff") + groups)
        return self.meter.count()


@pytest.mark.parametrize("features", [0x80, 0])
@pytest.mark.parametrize("block_size", [0, 1, 2, 6])
def test_directories_of_all_block_groups_are_counted(tmp_path: Path, features: int, block_size: int):
    assert FakeBlockDevice(tmp_path).count(3, 0, 40_000, features=features, block_size=block_size) == 40_003


def test_large_number_of_directories_is_counted(tmp_path: Path):
    assert FakeBlockDevice(tmp_path).count(70_000, 1) == 70_001


def test_directory_count_of_an_unknown_layout_is_unknown(tmp_path: Path):
    disk = FakeBlockDevice(tmp_path)
    assert disk.count(3, magic=0xEF54) is None
    assert disk.count(3, features=0x90) is None
    assert disk.count(3, size=128) is None
    disk.device.write_bytes(disk.device.read_bytes()[:4100])
    assert disk.meter.count() is None
    disk.device.write_bytes(b"")
    assert disk.meter.count() is None
    disk.device.unlink()
    assert disk.meter.count() is None


def test_directory_count_of_a_file_system_that_others_use_is_unknown(tmp_path: Path):
    assert DirectoryMeter(tmp_path).count() is None
    assert DirectoryMeter(tmp_path / "missing").count() is None


def test_descriptors_are_not_read_while_the_disk_has_few_files():
    assert DirectoryMeter(Path("/proc")).count() == 0


def test_more_directories_than_the_limit_are_a_violation():
    assert KernelUsage(disk_directories=DISK_DIRECTORIES_MAX).find_exceeded_limit() == ""
    assert "directories" in KernelUsage(disk_directories=DISK_DIRECTORIES_MAX + 1).find_exceeded_limit()
