"""Two sandboxes never share a kernel uid, whoever makes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.model.errors import AttemptError
from sandbox.runtimes import processes
from sandbox.runtimes.kernel_uid import KernelUids

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root has kernel uids to give")
UIDS = range(299_900, 299_903)


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
    one, other = KernelUids(UIDS, directory), KernelUids(UIDS, directory)
    assert [one.claim("a"), other.claim("b"), one.claim("c")] == list(UIDS)
    with pytest.raises(AttemptError, match="in use"):
        other.claim("d")
    other.release("b")
    assert one.claim("d") == UIDS[1]
    for attempt_id in "acd":
        one.release(attempt_id)


def test_a_uid_that_a_process_has_is_passed_over(directory: Path, process_with_first_uid: subprocess.Popen[bytes]):
    uids = KernelUids(UIDS, directory)
    assert processes.find_by_uid(UIDS[0]) == [process_with_first_uid.pid]
    assert uids.claim("a") == UIDS[1]
    uids.release("a")


def test_a_dead_processs_claim_is_nobodys(directory: Path):
    source = f"""
from pathlib import Path
from sandbox.runtimes.kernel_uid import KernelUids
import os, signal
assert KernelUids(range({UIDS.start}, {UIDS.stop}), Path({str(directory)!r})).claim("dead") == {UIDS.start}
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", source], check=False, timeout=30)
    uids = KernelUids(UIDS, directory)
    with uids.owned(UIDS[0], "dead") as is_ours:
        assert is_ours()
        assert KernelUids(UIDS, directory).claim("other") == UIDS[1]


def test_a_uid_that_became_another_attempts_is_not_the_old_ones_any_more(directory: Path):
    holder, asker = KernelUids(UIDS, directory), KernelUids(UIDS, directory)
    assert holder.claim("new") == UIDS[0]
    with asker.owned(UIDS[0], "old") as is_ours:
        assert not is_ours()
    with asker.owned(UIDS[0], "new") as is_ours:
        assert is_ours()
        holder.release("new")
        assert holder.claim("newer") == UIDS[0]
        assert not is_ours()
    holder.release("newer")


def test_a_directory_that_others_can_write_is_not_trusted(directory: Path):
    directory.mkdir(mode=0o755)
    with pytest.raises(AttemptError, match="0700"):
        KernelUids(UIDS, directory).claim("a")


def test_a_zombie_holds_nothing(process_with_first_uid: subprocess.Popen[bytes]):
    process_with_first_uid.kill()
    os.waitid(os.P_PID, process_with_first_uid.pid, os.WEXITED | os.WNOWAIT)
    assert processes.find_by_uid(UIDS[0]) == []
