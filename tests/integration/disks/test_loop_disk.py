"""The disk of an attempt: files persist, the size is enforced, and no mount outlives its process."""

import asyncio
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from doubles.multiprocessing_forkserver import MULTIPROCESSING_FORKSERVER
from sandbox.disks import loop_disk
from sandbox.disks.commands import run_command
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.disks.loop_disk import LoopDisk, loop_unavailable_reason, unshare_mounts
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.model.failure import AttemptError
from sandbox.model.fixed_limits import DISK_FILES_MAX

MIB = 1024 * 1024
CHILD_SECONDS = 60


@pytest.fixture
def layout(tmp_path):
    layout = AttemptLayout(tmp_path / "attempt")
    layout.root.mkdir()
    return layout


@pytest.fixture
def loop_works(tmp_path):
    reason = asyncio.run(loop_unavailable_reason(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")


def run_in_child(scenario, *arguments, exit_code=0):
    """Run the scenario and its assertions in a process with its own mount namespace, like a runner's."""
    child = MULTIPROCESSING_FORKSERVER.Process(target=_run_with_private_mounts, args=(scenario, *arguments))
    child.start()
    child.join(CHILD_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode == exit_code


def _run_with_private_mounts(scenario, layout, *arguments):
    unshare_mounts()
    asyncio.run(scenario(LoopDisk(layout), layout, *arguments))


def mount_points():
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def loop_files():
    backing_files = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing_files.append(backing.read_text().strip())
        except OSError:
            continue
    return backing_files


async def fills_up(disk, layout):
    await disk.open(32 * MIB)
    usage = await disk.measure_and_trim()
    assert not usage.is_full
    assert usage.total_bytes <= 32 * MIB
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (layout.disk / "large").write_bytes(b"x" * 33 * MIB)
    assert (await disk.measure_and_trim()).is_full
    (layout.disk / "large").unlink()
    assert not (await disk.measure_and_trim()).is_full
    (layout.disk / "small").write_bytes(b"kept")
    await disk.close()
    await disk.close()
    assert not list(layout.disk.iterdir())


async def finds_the_stored_file(disk, layout):
    await disk.open(32 * MIB)
    assert (layout.disk / "small").read_bytes() == b"kept"
    await disk.close()


def test_disk_enforces_its_size_and_persists_files(loop_works, layout):
    run_in_child(fills_up, layout)
    run_in_child(finds_the_stored_file, layout)
    assert str(layout.disk_image) not in loop_files()


async def starts_with_space(disk, layout):
    await disk.open(MIB)
    assert not (await disk.measure_and_trim()).is_full
    (layout.disk / "small").write_bytes(b"x" * (MIB // 4))
    assert not (await disk.measure_and_trim()).is_full
    (layout.disk / "large").write_bytes(b"x" * (MIB // 4))
    assert (await disk.measure_and_trim()).is_full


def test_smallest_disk_initially_has_free_space(loop_works, layout):
    run_in_child(starts_with_space, layout)


def make_files(directory, count):
    for number in range(count):
        (directory / f"file-{number}").touch()


async def runs_out_of_inodes(disk, layout):
    await disk.open(4 * MIB)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        make_files(layout.disk, 100_000)
    assert (await disk.measure_and_trim()).is_full


def test_disk_without_free_inodes_is_full(loop_works, layout):
    run_in_child(runs_out_of_inodes, layout)


GIB = 1024 * MIB


@pytest.mark.parametrize(
    ("size_bytes", "files_max"),
    [(GIB, GIB // 16384), (16 * GIB, DISK_FILES_MAX), (40 * GIB, DISK_FILES_MAX), (1000 * GIB, DISK_FILES_MAX)],
)
def test_number_of_files_grows_with_the_disk_up_to_a_limit(tmp_path, size_bytes, files_max):
    """mkfs.ext4 rounds up, because each group of blocks has a multiple of 16 inodes."""
    image = tmp_path / "disk.img"
    asyncio.run(loop_disk.make_file_system(image, size_bytes))
    with image.open("rb") as file:
        file.seek(1024)  # the superblock, which starts with the number of inodes
        assert struct.unpack("<I", file.read(4))[0] == pytest.approx(files_max, rel=0.15)


async def dies_with_an_open_file(disk, layout):
    await disk.open(32 * MIB)
    (layout.disk / "small").write_bytes(b"kept")
    with (layout.disk / "held").open("wb"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_disk_of_a_killed_process_can_be_reopened(loop_works, layout):
    run_in_child(dies_with_an_open_file, layout, exit_code=-signal.SIGKILL)
    assert str(layout.disk) not in mount_points()
    run_in_child(finds_the_stored_file, layout)


async def stays_hidden_from_the_host(disk, layout):
    await disk.open(32 * MIB)
    host = Path(f"/proc/{os.getppid()}/mountinfo").read_text()
    assert str(layout.disk) not in host
    assert str(layout.disk) in Path("/proc/self/mountinfo").read_text()


def test_mount_is_invisible_outside_the_process(loop_works, layout):
    run_in_child(stays_hidden_from_the_host, layout)


async def refuses_a_corrupt_image(disk, layout):
    with pytest.raises(AttemptError, match="disk could not be created"):
        await disk.open(32 * MIB)


def test_corrupt_disk_is_an_error_and_not_reformatted(loop_works, layout):
    layout.disk_image.write_bytes(b"no file system" * MIB)
    run_in_child(refuses_a_corrupt_image, layout)


async def writes_below_a_directory(disk, layout):
    await disk.open(32 * MIB)
    (layout.disk / "workspace").mkdir()
    (layout.disk / "workspace" / "small").write_bytes(b"kept")
    await disk.close()


async def finds_the_orphaned_file(disk, layout):
    await disk.open(32 * MIB)
    assert [path.read_bytes() for path in layout.disk.rglob("*") if path.is_file()] == [b"kept"]
    await disk.close()


def test_damage_from_a_power_loss_is_repaired(loop_works, layout):
    """The control is `test_corrupt_disk_is_an_error_and_not_reformatted`."""
    run_in_child(writes_below_a_directory, layout)
    for damage in ("clri /workspace", "set_super_value state 0"):
        subprocess.run(["debugfs", "-w", "-R", damage, str(layout.disk_image)], check=True, capture_output=True)
    run_in_child(finds_the_orphaned_file, layout)


async def dies_during_a_command(_disk, _layout, started):
    command = asyncio.ensure_future(run_command("sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(started)))
    async with asyncio.timeout(CHILD_SECONDS):
        while not started.exists() or not started.read_text().endswith("\n"):
            await asyncio.sleep(0.01)
    assert not command.done()
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_commands_of_a_killed_process_are_killed(loop_works, layout, tmp_path):
    """An fsck that outlived its process could change a file system that the next process has mounted."""
    started = tmp_path / "started"
    run_in_child(dies_during_a_command, layout, started, exit_code=-signal.SIGKILL)
    process_id = int(started.read_text())
    deadline = time.monotonic() + 5
    while is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.01)
    survived = is_alive(process_id)
    if survived:
        os.kill(process_id, signal.SIGKILL)
    assert not survived


async def holds_until_released(disk, layout, opened, release):
    await disk.open(32 * MIB)
    opened.set()
    release.wait(CHILD_SECONDS)


async def fails_to_open(disk, layout):
    with pytest.raises(AttemptError, match="still uses the disk"):
        await disk.open(32 * MIB)


async def fails_to_open_quickly(disk, layout):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.loop_disk.DISK_RELEASE_TIMEOUT_SECONDS", 0.1)
        await fails_to_open(disk, layout)


def test_disk_is_not_opened_again_through_another_path(loop_works, layout, tmp_path):
    context = MULTIPROCESSING_FORKSERVER
    opened, release = context.Event(), context.Event()
    (tmp_path / "elsewhere").symlink_to(layout.root)
    child = context.Process(target=_run_with_private_mounts, args=(holds_until_released, layout, opened, release))
    child.start()
    try:
        assert opened.wait(CHILD_SECONDS)
        run_in_child(fails_to_open_quickly, AttemptLayout(tmp_path / "elsewhere"))
    finally:
        release.set()
        child.join(CHILD_SECONDS)
    assert child.exitcode == 0


async def closes_a_busy_disk(disk, layout):
    await disk.open(32 * MIB)
    with (layout.disk / "held").open("wb"), pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.loop_disk.DISK_RELEASE_TIMEOUT_SECONDS", 0.1)
        await disk.close()
        layout.disk.rmdir()
        layout.disk_image.unlink()


def test_closing_a_busy_disk_leaves_nothing_on_the_host(loop_works, layout):
    run_in_child(closes_a_busy_disk, layout)
    assert not list(layout.root.iterdir())
    assert not [backing for backing in loop_files() if str(layout.disk_image) in backing]


def test_partially_created_file_system_is_recreated(loop_works, layout):
    layout.disk_image.with_suffix(".part").write_bytes(b"half")
    run_in_child(fills_up, layout)


async def test_directory_disk_is_measured_recursively(layout):
    disk = DirectoryDisk(layout)
    await disk.open(2 * MIB)
    deep = layout.disk / "workspace" / "a" / "b"
    deep.mkdir(parents=True)
    assert not (await disk.measure_and_trim()).is_full
    (deep / "large").write_bytes(b"x" * 3 * MIB)
    usage = await disk.measure_and_trim()
    assert usage.is_full
    assert usage.used_bytes >= 3 * MIB
    assert usage.total_bytes == 2 * MIB
    await disk.close()
    assert (deep / "large").exists()


async def test_directory_disk_limits_the_number_of_empty_files(layout):
    disk = DirectoryDisk(layout)
    await disk.open(2 * MIB)
    make_files(layout.disk, 100)
    assert not (await disk.measure_and_trim()).is_full
    make_files(layout.disk, 600)
    usage = await disk.measure_and_trim()
    assert usage.used_bytes < usage.total_bytes
    assert usage.is_full


async def test_missing_directory_disk_is_an_error(layout):
    async def scenario():
        disk = DirectoryDisk(layout)
        await disk.open(2 * MIB)
        shutil.rmtree(layout.disk)
        await disk.measure_and_trim()

    with pytest.raises(OSError, match="disk usage cannot be measured"):
        await scenario()


FREE_CHUNK_BYTES = 8192
PREALLOCATIONS = re.compile(r"^ext4_prealloc_space +(\d+)", re.MULTILINE)
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def count_preallocations():
    return int(PREALLOCATIONS.search(Path("/proc/slabinfo").read_text())[1])


def punch_holes(file, size_bytes):
    """Free every other chunk of FREE_CHUNK_BYTES in the file."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    for start in range(0, size_bytes, 2 * FREE_CHUNK_BYTES):
        mode, bounds = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, map(ctypes.c_long, (start, FREE_CHUNK_BYTES))
        assert fallocate(file, mode, *bounds) == 0


def fill_with_fragments(directory, size_bytes):
    """Leave at most FREE_CHUNK_BYTES of contiguous space; return the descriptor of the file that occupies the rest."""
    file = os.open(directory / "fragments", os.O_WRONLY | os.O_CREAT)
    for _ in range(size_bytes // MIB):
        os.write(file, b"x" * MIB)
    os.fsync(file)
    punch_holes(file, size_bytes)
    return file


async def preallocates(disk, layout, count):
    """Write single, widely spaced blocks to a file that stays open; return the number of remaining preallocations."""
    await disk.open(64 * MIB)
    os.close(fill_with_fragments(layout.disk, 52 * MIB))
    before = count_preallocations()
    file = os.open(layout.disk / "sparse", os.O_WRONLY | os.O_CREAT)
    os.ftruncate(file, 2**40)
    for number in range(count):
        os.pwrite(file, b"y", number * 64 * 1024)
    os.fsync(file)
    preallocations = count_preallocations() - before
    os.close(file)
    await disk.close()
    return preallocations


async def shares_preallocations(disk, layout):
    assert await preallocates(disk, layout, 2000) < 500


async def preallocates_for_each_file(disk, layout):
    loop_disk.share_preallocations = lambda _: None
    assert await preallocates(disk, layout, 2000) > 1500


def test_open_file_has_few_preallocations(loop_works, layout):
    """The kernel charges preallocations to no control group, and removes those of a file without interruption."""
    run_in_child(shares_preallocations, layout)


def test_kernel_preallocates_blocks_for_an_open_file_by_default(loop_works, layout):
    """The control for `test_open_file_has_few_preallocations`."""
    run_in_child(preallocates_for_each_file, layout)


async def stores_large_files(disk, layout):
    await disk.open(256 * MIB)
    contents = {f"file-{number}": os.urandom(MIB) * 40 for number in range(2)}
    files = {name: (layout.disk / name).open("wb") for name in contents}
    for start in range(0, 40 * MIB, MIB):
        for name, file in files.items():
            file.write(contents[name][start : start + MIB])
            file.flush()
            os.fsync(file.fileno())
    for file in files.values():
        file.close()
    await disk.sync()
    await disk.close()
    await disk.open(256 * MIB)
    assert {name: (layout.disk / name).read_bytes() for name in contents} == contents
    await disk.close()


def test_large_files_are_stored_with_shared_preallocations(loop_works, layout):
    run_in_child(stores_large_files, layout)


async def opens_with_read_only_settings(disk, layout, settings):
    loop_disk._EXT4_SETTINGS = settings
    assert not loop_disk.can_share_preallocations()
    await disk.open(32 * MIB)
    await disk.close()


def test_disk_works_if_its_settings_cannot_be_changed(loop_works, layout, tmp_path):
    run_in_child(opens_with_read_only_settings, layout, tmp_path / "absent")


def count_discards(image):
    """Return the number of discards since the device was created. Earlier disks may have used the device."""
    (device,) = loop_disk.find_devices(image)
    return int((device / "stat").read_text().split()[11])


async def truncates_without_discards(disk, layout):
    await disk.open(64 * MIB)
    before = count_discards(layout.disk_image)
    file = fill_with_fragments(layout.disk, 48 * MIB)
    os.ftruncate(file, 0)
    os.close(file)
    (layout.disk / "fragments").unlink()
    await disk.sync()
    assert count_discards(layout.disk_image) == before


def test_removal_of_a_fragmented_file_discards_no_blocks(loop_works, layout):
    """Discarding 150,000 extents takes longer than a killed process may take to end."""
    run_in_child(truncates_without_discards, layout)


def allocated_bytes(image):
    return image.stat().st_blocks * 512


async def returns_space(disk, layout, trim_seconds):
    loop_disk._UNUSED_BYTES_MAX, loop_disk._TRIM_STEP_BYTES, loop_disk._TRIM_SECONDS = 16 * MIB, 32 * MIB, trim_seconds
    await disk.open(128 * MIB)
    (layout.disk / "kept").write_bytes(b"kept" * MIB)
    (layout.disk / "removed").write_bytes(b"x" * 64 * MIB)
    await disk.sync()
    (layout.disk / "removed").unlink()
    assert allocated_bytes(layout.disk_image) > 64 * MIB
    async with asyncio.timeout(CHILD_SECONDS):
        while allocated_bytes(layout.disk_image) - (await disk.measure_and_trim()).used_bytes > 16 * MIB:
            await asyncio.sleep(0.01)
    await disk.close()
    await disk.open(128 * MIB)
    assert (layout.disk / "kept").read_bytes() == b"kept" * MIB
    await disk.close()


@pytest.mark.parametrize("trim_seconds", [1e-6, 60])
def test_space_used_by_removed_files_is_returned_to_the_host(loop_works, layout, trim_seconds):
    """With a tiny time limit, each measurement trims a single step."""
    run_in_child(returns_space, layout, trim_seconds)


_GET_CACHED_EXTENTS = 0xC020662A  # EXT4_IOC_GET_ES_CACHE, see FS_IOC_FIEMAP


def count_cached_extents(path):
    """Return the number of a file's extents and holes that the kernel has cached."""
    request = bytearray(struct.pack("=QQIIII", 0, (1 << 64) - 1, 0, 0, 0, 0))
    with path.open("rb") as file:
        fcntl.ioctl(file, _GET_CACHED_EXTENTS, request)
    return struct.unpack("=QQIIII", request)[3]


async def forgets_the_extents_of_the_image(disk, layout):
    await disk.open(1024 * MIB)  # with blocks of 4 KiB, the kernel does not fill small gaps with zeros
    blocks = [os.urandom(4096) for _ in range(2000)]
    with (layout.disk / "fragmented").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * 4096 * len(blocks))
        for number, block in enumerate(blocks):
            os.pwrite(file.fileno(), block, 2 * 4096 * number)
    await disk.sync()
    assert count_cached_extents(layout.disk_image) > len(blocks)
    await disk.measure_and_trim()
    assert count_cached_extents(layout.disk_image) < len(blocks)
    await disk.close()
    await disk.open(1024 * MIB)
    content = (layout.disk / "fragmented").read_bytes()
    assert [content[at : at + 4096] for at in range(0, len(content), 8192)] == blocks
    await disk.close()


def test_cached_extents_of_a_fragmented_image_are_removed(loop_works, layout):
    try:
        layout.disk_image.touch()
        count_cached_extents(layout.disk_image)
    except OSError:
        pytest.skip("only ext4 caches extents")
    finally:
        layout.disk_image.unlink()
    run_in_child(forgets_the_extents_of_the_image, layout)


def test_removing_cached_extents_of_a_missing_image_is_not_an_error(layout):
    loop_disk.forget_cached_extents(layout.disk_image)
    assert not layout.disk_image.exists()


async def closes_while_trimming(disk, layout):
    loop_disk._UNUSED_BYTES_MAX = 0
    await disk.open(64 * MIB)
    (layout.disk / "removed").write_bytes(b"x" * 32 * MIB)
    await disk.sync()
    (layout.disk / "removed").unlink()
    measurement = asyncio.create_task(disk.measure_and_trim())
    await asyncio.sleep(0)
    measurement.cancel()
    await disk.close()
    assert not layout.disk.is_mount()


def test_disk_can_be_closed_while_it_is_trimmed(loop_works, layout):
    run_in_child(closes_while_trimming, layout)
    assert str(layout.disk_image) not in loop_files()


async def keeps_a_little_unused_space(disk, layout):
    await disk.open(64 * MIB)
    (layout.disk / "removed").write_bytes(b"x" * 32 * MIB)
    await disk.sync()
    (layout.disk / "removed").unlink()
    before = count_discards(layout.disk_image)
    await disk.measure_and_trim()
    assert count_discards(layout.disk_image) == before
    await disk.close()


def test_small_amount_of_unused_space_is_not_returned_to_the_host(loop_works, layout):
    run_in_child(keeps_a_little_unused_space, layout)


async def survives_a_host_without_holes(disk, layout):
    loop_disk._UNUSED_BYTES_MAX, loop_disk._FITRIM = 0, 0  # no file system supports this request
    await disk.open(64 * MIB)
    (layout.disk / "removed").write_bytes(b"x" * 32 * MIB)
    await disk.sync()
    (layout.disk / "removed").unlink()
    descriptors = [*Path("/proc/self/fd").iterdir()]
    for _ in range(3):
        assert not (await disk.measure_and_trim()).is_full
    assert [*Path("/proc/self/fd").iterdir()] == descriptors
    await disk.close()


def test_usage_is_measured_even_if_the_host_cannot_punch_holes(loop_works, layout):
    run_in_child(survives_a_host_without_holes, layout)


def test_error_of_unshare_is_raised(monkeypatch):
    class FailingLibc:
        def unshare(self, _):
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr("sandbox.disks.loop_disk.ctypes.CDLL", lambda *_, **__: FailingLibc())
    with pytest.raises(PermissionError):
        unshare_mounts()
