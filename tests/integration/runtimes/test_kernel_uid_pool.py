"""Two sandboxes never share a kernel uid, even with several servers."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes import kernel_uid_pool, sandbox_processes
from sandbox.runtimes.kernel_uid_pool import KernelUidPool

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can claim kernel uids")
_FIRST = 270_000 + os.getpid() % 9_000 * 3  # another test run on this machine uses a different range
UIDS = range(_FIRST, _FIRST + 3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "uids"


@pytest.fixture
def process_with_first_uid():
    process = subprocess.Popen(["/usr/bin/sleep", "60"], user=UIDS[0], group=UIDS[0], extra_groups=[])
    yield process
    process.kill()
    process.wait(10)


def test_uids_are_distinct_and_can_be_reused_after_their_release(directory: Path):
    first, second = KernelUidPool(UIDS, directory), KernelUidPool(UIDS, directory)
    claimed = [first.claim("a"), second.claim("b"), first.claim("c")]
    assert sorted(claimed) == list(UIDS)
    with pytest.raises(AttemptError, match="in use"):
        second.claim("d")
    second.release("b")
    assert first.claim("d") == first.claim("d") == claimed[1]
    assert first.holds_claim(claimed[1], "d")
    assert not first.holds_claim(claimed[1], "a")
    for attempt_id in "acd":
        first.release(attempt_id)


def test_uid_of_a_running_process_is_skipped(directory: Path, process_with_first_uid: subprocess.Popen[bytes]):
    uids = KernelUidPool(UIDS, directory)
    assert sandbox_processes.find_by_uid(UIDS[0]) == [process_with_first_uid.pid]
    assert {uids.claim("a"), uids.claim("b")} == set(UIDS[1:])
    with pytest.raises(AttemptError, match="in use"):
        uids.claim("c")
    for attempt_id in "ab":
        uids.release(attempt_id)


def _claim_and_die(directory: Path) -> int:
    """Claim a uid for the attempt "dead" in a process that is then killed. Return the uid."""
    source = f"""
from pathlib import Path
from sandbox.runtimes.kernel_uid_pool import KernelUidPool
import os, signal
print(KernelUidPool(range({UIDS.start}, {UIDS.stop}), Path({str(directory)!r})).claim("dead"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    completed = subprocess.run([sys.executable, "-c", source], check=False, timeout=30, capture_output=True)
    return int(completed.stdout)


def test_uid_claimed_by_a_dead_process_remains_reserved(directory: Path):
    uid = _claim_and_die(directory)
    uids = KernelUidPool(UIDS, directory)
    with uids.lock_if_unclaimed(uid, "dead") as is_owned:
        assert is_owned()
        assert KernelUidPool(UIDS, directory).claim("other") != uid


def test_reclaimed_uid_is_not_owned_by_the_old_attempt(directory: Path):
    holder, checker = KernelUidPool(UIDS, directory), KernelUidPool(UIDS, directory)
    uid = holder.claim("new")
    with checker.lock_if_unclaimed(uid, "old") as is_owned:
        assert not is_owned()
    with checker.lock_if_unclaimed(uid, "new") as is_owned:
        assert is_owned()
        holder.release("new")
        assert holder.claim("newer") == uid
        assert not is_owned()
    holder.release("newer")


def test_servers_with_separate_lock_directories_claim_distant_uids(tmp_path: Path):
    """A host and a container on it can use the same uids but separate lock directories."""
    uid_range = range(300_000, 364_000)
    claimed_uids = []
    for name in ("host", "container", "other"):
        uids = KernelUidPool(uid_range, tmp_path / name)
        claimed_uids.append(uids.claim("a"))
        uids.release("a")
    assert all(abs(first - second) > 64 for first in claimed_uids for second in claimed_uids if first != second)
    assert len(set(claimed_uids)) == 3


def test_directory_writable_by_others_is_refused(directory: Path):
    directory.mkdir(mode=0o755)
    with pytest.raises(AttemptError, match="0700"):
        KernelUidPool(UIDS, directory).claim("a")


def test_zombie_reserves_no_uid(process_with_first_uid: subprocess.Popen[bytes]):
    process_with_first_uid.kill()
    os.waitid(os.P_PID, process_with_first_uid.pid, os.WEXITED | os.WNOWAIT)
    assert sandbox_processes.find_by_uid(UIDS[0]) == []


def test_uid_with_files_in_transit_is_checked_only_once(directory: Path, monkeypatch):
    """A check starts a process, so repeated checks of many uids would delay the start of each sandbox."""
    probed = []

    def is_first(uid: int, _seconds: float = 0) -> bool:
        probed.append(uid)
        return uid == probed[0]

    monkeypatch.setattr(kernel_uid_pool, "_has_files_in_transit", is_first)
    uids = KernelUidPool(UIDS, directory)
    for name in ("a", "b", "c"):
        assert uids.claim(name) != probed[0]
        uids.release(name)
    assert probed.count(probed[0]) == 1


@pytest.fixture
def checked_uids(monkeypatch) -> list[int]:
    """The uids that are checked for files in transit. Each check finds none."""
    checked: list[int] = []

    def has_files_in_flight(uid: int, _seconds: float = 0) -> bool:
        checked.append(uid)
        return False

    monkeypatch.setattr(kernel_uid_pool, "_has_files_in_transit", has_files_in_flight)
    return checked


def test_uid_that_was_checked_at_its_release_is_claimed_without_a_check(directory: Path, checked_uids: list[int]):
    """The check starts a process, which would delay the start of each sandbox."""
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    uids.release("a")
    del checked_uids[:]
    assert KernelUidPool(UIDS, directory).claim("b") == uid
    assert checked_uids == []


@pytest.mark.parametrize("result", [True, None], ids=["files in transit", "check failed"])
def test_uid_that_failed_the_check_at_its_release_is_checked_when_it_is_claimed(
    directory: Path, monkeypatch, result: bool | None
):
    results = [False, result, False]
    monkeypatch.setattr(kernel_uid_pool, "_has_files_in_transit", lambda *_: results.pop(0))
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    uids.release("a")
    assert uids.claim("b") == uid
    assert results == []


def test_uid_of_a_leftover_process_is_checked_when_it_is_claimed(directory: Path, checked_uids: list[int]):
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    process = subprocess.Popen(["/usr/bin/sleep", "60"], user=uid, group=uid, extra_groups=[])
    uids.release("a")
    process.kill()
    process.wait(10)
    del checked_uids[:]
    assert uids.claim("b") == uid
    assert checked_uids == [uid]


def test_uid_that_an_earlier_version_claimed_in_the_meantime_is_checked(directory: Path, checked_uids: list[int]):
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    uids.release("a")
    (directory / str(uid)).write_bytes(b"old")
    del checked_uids[:]
    assert uids.claim("b") == uid
    assert checked_uids == [uid]


def test_uid_of_an_owner_that_died_is_checked(directory: Path, checked_uids: list[int]):
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    uids.release("a")
    assert _claim_and_die(directory) == uid
    del checked_uids[:]
    assert uids.claim("c") == uid
    assert checked_uids == [uid]


def test_released_uid_has_no_owner(directory: Path):
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    assert uids.find_uid("a") == uid
    uids.release("a")
    assert uids.find_uid("a") is None
    assert not uids.was_last_claimed_by(uid, "a")


_SEND_FILE = "import array, socket; socket.socket(fileno=1).sendmsg([b'x'], [(1, 1, array.array('i', [1]))])"


def test_uid_with_files_in_transit_is_skipped(directory: Path):
    receiver, sender = socket.socketpair()
    with receiver:
        with sender:
            argv = ["/usr/bin/python3", "-I", "-c", _SEND_FILE]
            subprocess.run(argv, stdout=sender, user=UIDS[0], group=UIDS[0], extra_groups=[], check=True, timeout=30)
        uids = KernelUidPool(UIDS, directory)
        assert {uids.claim("a"), uids.claim("b")} == set(UIDS[1:])
        with pytest.raises(AttemptError, match="in use"):
            uids.claim("c")
        assert [path.name for path in directory.glob("*.retired")] == [f"{UIDS[0]}.retired"]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the kernel frees the files some time after the socket is closed
        with contextlib.suppress(AttemptError):
            assert uids.claim("c") == UIDS[0]
            assert not list(directory.glob("*.retired"))
            return
    pytest.fail("the uid is not claimed again")


def test_uid_whose_sandbox_left_files_in_transit_is_skipped(directory: Path):
    uids = KernelUidPool(UIDS, directory)
    uid = uids.claim("a")
    receiver, sender = socket.socketpair()
    with receiver:
        with sender:
            argv = ["/usr/bin/python3", "-I", "-c", _SEND_FILE]
            subprocess.run(argv, stdout=sender, user=uid, group=uid, extra_groups=[], check=True, timeout=30)
        uids.release("a")
        assert uids.claim("b") != uid
        assert [path.name for path in directory.glob("*.retired")] == [f"{uid}.retired"]
