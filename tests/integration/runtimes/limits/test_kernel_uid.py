"""Two sandboxes never share a kernel uid, whoever makes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.model.errors import AttemptError
from sandbox.runtimes import processes
from sandbox.runtimes.limits.kernel_uid import KernelUidPool

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root has kernel uids to give")
_FIRST = 270_000 + os.getpid() % 9_000 * 3  # another run of the tests on this machine has others
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


def test_claims_are_distinct_until_none_is_left_and_come_back(directory: Path):
    one, other = KernelUidPool(UIDS, directory), KernelUidPool(UIDS, directory)
    claimed = [one.allocate("a"), other.allocate("b"), one.allocate("c")]
    assert sorted(claimed) == list(UIDS)
    with pytest.raises(AttemptError, match="in use"):
        other.allocate("d")
    other.release("b")
    assert one.allocate("d") == one.allocate("d") == claimed[1]
    assert one.has_allocated(claimed[1], "d")
    assert not one.has_allocated(claimed[1], "a")
    for attempt_id in "acd":
        one.release(attempt_id)


def test_a_uid_that_a_process_has_is_passed_over(directory: Path, process_with_first_uid: subprocess.Popen[bytes]):
    uids = KernelUidPool(UIDS, directory)
    assert processes.find_by_uid(UIDS[0]) == [process_with_first_uid.pid]
    assert {uids.allocate("a"), uids.allocate("b")} == set(UIDS[1:])
    with pytest.raises(AttemptError, match="in use"):
        uids.allocate("c")
    for attempt_id in "ab":
        uids.release(attempt_id)


def test_a_dead_processs_claim_is_nobodys(directory: Path):
    source = f"""
from pathlib import Path
from sandbox.runtimes.limits.kernel_uid import KernelUidPool
import os, signal
print(KernelUidPool(range({UIDS.start}, {UIDS.stop}), Path({str(directory)!r})).allocate("dead"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", source], check=False, timeout=30, capture_output=True)
    uid = int(ran.stdout)
    uids = KernelUidPool(UIDS, directory)
    with uids.guard_ownership(uid, "dead") as is_ours:
        assert is_ours()
        assert KernelUidPool(UIDS, directory).allocate("other") != uid


def test_a_uid_that_became_another_attempts_is_not_the_old_ones_any_more(directory: Path):
    holder, asker = KernelUidPool(UIDS, directory), KernelUidPool(UIDS, directory)
    uid = holder.allocate("new")
    with asker.guard_ownership(uid, "old") as is_ours:
        assert not is_ours()
    with asker.guard_ownership(uid, "new") as is_ours:
        assert is_ours()
        holder.release("new")
        assert holder.allocate("newer") == uid
        assert not is_ours()
    holder.release("newer")


def test_servers_that_cannot_see_each_others_claims_begin_far_apart(tmp_path: Path):
    """As on a host and in a container beside it: the same uids, two lock directories."""
    many = range(300_000, 364_000)
    claims = []
    for name in ("host", "container", "other"):
        uids = KernelUidPool(many, tmp_path / name)
        claims.append(uids.allocate("a"))
        uids.release("a")
    assert all(abs(one - other) > 64 for one in claims for other in claims if one != other)
    assert len(set(claims)) == 3


def test_a_directory_that_others_can_write_is_not_trusted(directory: Path):
    directory.mkdir(mode=0o755)
    with pytest.raises(AttemptError, match="0700"):
        KernelUidPool(UIDS, directory).allocate("a")


def test_a_zombie_holds_nothing(process_with_first_uid: subprocess.Popen[bytes]):
    process_with_first_uid.kill()
    os.waitid(os.P_PID, process_with_first_uid.pid, os.WEXITED | os.WNOWAIT)
    assert processes.find_by_uid(UIDS[0]) == []
