"""An attempt's disk: what is on it stays, what is past its size does not fit, and no mount outlives its process."""

import asyncio
import ctypes
import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from doubles.child_processes import OWN_PROCESSES
from sandbox.disks.directory import DirectoryDisks
from sandbox.disks.loop import LoopDisks, loop_unavailable_reason, run_command, unshare_mounts
from sandbox.interfaces.layout import AttemptLayout
from sandbox.model.errors import AttemptError

MIB = 1024 * 1024
CHILD_SECONDS = 60


@pytest.fixture
def files(tmp_path):
    layout = AttemptLayout(tmp_path / "attempt")
    layout.root.mkdir()
    return layout


@pytest.fixture
def loop_works(tmp_path):
    reason = asyncio.run(loop_unavailable_reason(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")


def in_a_process_of_its_own(story, *arguments, ends_by=0):
    """As a runner is: with mounts of its own. The story's assertions count."""
    child = OWN_PROCESSES.Process(target=_with_hidden_mounts, args=(story, *arguments))
    child.start()
    child.join(CHILD_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode == ends_by


def _with_hidden_mounts(story, *arguments):
    unshare_mounts()
    asyncio.run(story(LoopDisks(), *arguments))


def mount_points():
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def loop_files():
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.append(backing.read_text().strip())
        except OSError:
            continue
    return found


async def fills_up(disks, files):
    await disks.open(files, 32 * MIB)
    use = await disks.usage(files)
    assert not use.is_full
    assert use.total_bytes <= 32 * MIB
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (files.disk / "large").write_bytes(b"x" * 33 * MIB)
    assert (await disks.usage(files)).is_full
    (files.disk / "large").unlink()
    assert not (await disks.usage(files)).is_full
    (files.disk / "small").write_bytes(b"kept")
    await disks.close(files)
    await disks.close(files)
    assert not list(files.disk.iterdir())


async def finds_what_was_kept(disks, files):
    await disks.open(files, 32 * MIB)
    assert (files.disk / "small").read_bytes() == b"kept"
    await disks.close(files)


def test_a_full_disk_is_full_and_what_fits_is_kept(loop_works, files):
    in_a_process_of_its_own(fills_up, files)
    in_a_process_of_its_own(finds_what_was_kept, files)
    assert str(files.disk_image) not in loop_files()


async def begins_with_room(disks, files):
    await disks.open(files, MIB)
    assert not (await disks.usage(files)).is_full
    (files.disk / "small").write_bytes(b"x" * (MIB // 4))
    assert not (await disks.usage(files)).is_full
    (files.disk / "large").write_bytes(b"x" * (MIB // 4))
    assert (await disks.usage(files)).is_full


def test_the_smallest_disk_is_full_only_when_it_is(loop_works, files):
    in_a_process_of_its_own(begins_with_room, files)


def make_files(directory, count):
    for number in range(count):
        (directory / f"file-{number}").touch()


async def runs_out_of_names(disks, files):
    await disks.open(files, 4 * MIB)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        make_files(files.disk, 100_000)
    assert (await disks.usage(files)).is_full


def test_a_disk_without_names_left_is_full_too(loop_works, files):
    in_a_process_of_its_own(runs_out_of_names, files)


async def dies_with_it_open(disks, files):
    await disks.open(files, 32 * MIB)
    (files.disk / "small").write_bytes(b"kept")
    with (files.disk / "held").open("wb"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_process_finds_the_disk_of_one_that_was_killed(loop_works, files):
    in_a_process_of_its_own(dies_with_it_open, files, ends_by=-signal.SIGKILL)
    assert str(files.disk) not in mount_points()
    in_a_process_of_its_own(finds_what_was_kept, files)


async def is_not_shown_to_others(disks, files):
    await disks.open(files, 32 * MIB)
    host = Path(f"/proc/{os.getppid()}/mountinfo").read_text()
    assert str(files.disk) not in host
    assert str(files.disk) in Path("/proc/self/mountinfo").read_text()


def test_nobody_else_on_the_machine_sees_the_mount(loop_works, files):
    in_a_process_of_its_own(is_not_shown_to_others, files)


async def refuses_what_is_no_file_system(disks, files):
    with pytest.raises(AttemptError, match="disk could not be made"):
        await disks.open(files, 32 * MIB)


def test_a_broken_disk_is_told_and_never_taken_for_an_empty_one(loop_works, files):
    files.disk_image.write_bytes(b"no file system" * MIB)
    in_a_process_of_its_own(refuses_what_is_no_file_system, files)


async def keeps_what_is_below_a_directory(disks, files):
    await disks.open(files, 32 * MIB)
    (files.disk / "workspace").mkdir()
    (files.disk / "workspace" / "small").write_bytes(b"kept")
    await disks.close(files)


async def finds_what_had_lost_its_directory(disks, files):
    await disks.open(files, 32 * MIB)
    assert [path.read_bytes() for path in files.disk.rglob("*") if path.is_file()] == [b"kept"]
    await disks.close(files)


def test_what_a_power_loss_left_broken_is_mended_as_far_as_it_goes(loop_works, files):
    """The twin is the disk that is no file system at all."""
    in_a_process_of_its_own(keeps_what_is_below_a_directory, files)
    for wound in ("clri /workspace", "set_super_value state 0"):
        subprocess.run(["debugfs", "-w", "-R", wound, str(files.disk_image)], check=True, capture_output=True)
    in_a_process_of_its_own(finds_what_had_lost_its_directory, files)


async def dies_while_a_command_goes_on(_, begun):
    command = asyncio.ensure_future(run_command("sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(begun)))
    async with asyncio.timeout(CHILD_SECONDS):
        while not begun.exists() or not begun.read_text().endswith("\n"):
            await asyncio.sleep(0.01)
    assert not command.done()
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_command_of_a_killed_process_goes_on_with_the_disk(loop_works, tmp_path):
    """A check that went on would change the file system under the next process's mount."""
    begun = tmp_path / "begun"
    in_a_process_of_its_own(dies_while_a_command_goes_on, begun, ends_by=-signal.SIGKILL)
    process_id = int(begun.read_text())
    deadline = time.monotonic() + 5
    while is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.01)
    survived = is_alive(process_id)
    if survived:
        os.kill(process_id, signal.SIGKILL)
    assert not survived


async def holds_it_until_told(disks, files, held, told):
    await disks.open(files, 32 * MIB)
    held.set()
    told.wait(CHILD_SECONDS)


async def gets_it_not(disks, files):
    with pytest.raises(AttemptError, match="still has it"):
        await disks.open(files, 32 * MIB)


async def gets_it_not_within_a_moment(disks, files):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.loop.DISK_RELEASE_SECONDS", 0.1)
        await gets_it_not(disks, files)


def test_a_disk_is_not_opened_twice_though_it_has_another_name(loop_works, files, tmp_path):
    context = OWN_PROCESSES
    held, told = context.Event(), context.Event()
    (tmp_path / "elsewhere").symlink_to(files.root)
    child = context.Process(target=_with_hidden_mounts, args=(holds_it_until_told, files, held, told))
    child.start()
    try:
        assert held.wait(CHILD_SECONDS)
        in_a_process_of_its_own(gets_it_not_within_a_moment, AttemptLayout(tmp_path / "elsewhere"))
    finally:
        told.set()
        child.join(CHILD_SECONDS)
    assert child.exitcode == 0


async def lets_go_of_what_is_in_use(disks, files):
    await disks.open(files, 32 * MIB)
    with (files.disk / "held").open("wb"), pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.loop.DISK_RELEASE_SECONDS", 0.1)
        await disks.close(files)
        files.disk.rmdir()
        files.disk_image.unlink()


def test_a_disk_that_is_in_use_for_too_long_leaves_nothing_on_the_host(loop_works, files):
    in_a_process_of_its_own(lets_go_of_what_is_in_use, files)
    assert not list(files.root.iterdir())
    assert not [backing for backing in loop_files() if str(files.disk_image) in backing]


def test_a_file_system_that_was_not_finished_is_made_anew(loop_works, files):
    files.disk_image.with_suffix(".part").write_bytes(b"half")
    in_a_process_of_its_own(fills_up, files)


def test_a_plain_disk_is_measured_with_everything_in_it(files):
    async def story():
        disks = DirectoryDisks()
        await disks.open(files, 2 * MIB)
        deep = files.disk / "workspace" / "a" / "b"
        deep.mkdir(parents=True)
        assert not (await disks.usage(files)).is_full
        (deep / "large").write_bytes(b"x" * 3 * MIB)
        use = await disks.usage(files)
        assert use.is_full
        assert use.used_bytes >= 3 * MIB
        assert use.total_bytes == 2 * MIB
        await disks.close(files)
        assert (deep / "large").exists()

    asyncio.run(story())


def test_a_plain_disk_holds_so_many_empty_files_and_no_more(files):
    async def story():
        disks = DirectoryDisks()
        await disks.open(files, 2 * MIB)
        make_files(files.disk, 100)
        assert not (await disks.usage(files)).is_full
        make_files(files.disk, 600)
        use = await disks.usage(files)
        assert use.used_bytes < use.total_bytes
        assert use.is_full

    asyncio.run(story())


def test_a_plain_disk_that_is_gone_is_an_error_and_not_an_empty_one(files):
    async def story():
        disks = DirectoryDisks()
        await disks.open(files, 2 * MIB)
        files.disk.rmdir()
        await disks.usage(files)

    with pytest.raises(OSError, match="cannot be told how full"):
        asyncio.run(story())


def test_a_process_that_may_not_hide_its_mounts_says_so(monkeypatch):
    class Refusing:
        def unshare(self, _):
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr("sandbox.disks.loop.ctypes.CDLL", lambda *_, **__: Refusing())
    with pytest.raises(PermissionError):
        unshare_mounts()
