"""Claims a separate kernel uid for each sandbox, machine-wide.

A claim is a lock on a file, held by the claiming process until it releases the uid or dies. The file contains the
attempt's id, so other processes can find the owner of a uid. Once the uid is released and known to be reusable, the
file contains `_REUSABLE` instead.
"""

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes import sandbox_processes

LOCK_DIRECTORY = Path("/run/sandbox-uids")
SANDBOX_UIDS = range(1_900_000_000, 1_900_065_000)
"""Uids that nothing else uses.

They are above the subordinate uids of login.defs (up to 600,100,000), which are used by containers of the machine's
users. They are also above the uids of systemd's containers (up to 1,879,048,191).
"""

FILES_UIDS_OFFSET = 100_000
"""Difference between the uid of a sandbox's files and its kernel uid, in runtimes that need both.

One claim covers both.
"""

_HASH_MULTIPLIER = 2_654_435_761
"""A prime near 2**32 divided by the golden ratio: it spreads neighboring directories far apart."""


_REUSABLE = b"-"
"""Content of the file of a uid that was released without files in transit. No attempt has this id.

The next claim overwrites it, even a claim by an earlier version.
"""


class KernelUidPool:
    """Allocates uids from a range. Only for root, because an ordinary user has a single uid."""

    def __init__(self, uid_range: range, directory: Path = LOCK_DIRECTORY) -> None:
        self._range = uid_range
        self._directory = directory
        self._claims: dict[str, tuple[int, int]] = {}

    def claim(self, attempt_id: str) -> int:
        """Claim a uid that is unclaimed and that no process uses. Raises AttemptError (provision_failed)."""
        if attempt_id in self._claims:
            return self._claims[attempt_id][0]
        try:
            self._ensure_directory()
            for includes_retired in (False, True):
                for uid in self._iterate_from_offset():
                    is_candidate = includes_retired or not self._retired_marker(uid).exists()
                    if is_candidate and self._try_claim(uid, attempt_id):
                        return uid
        except OSError as error:
            raise AttemptError(
                FailureCode.PROVISION_FAILED,
                f"No kernel uid could be allocated in {self._directory} ({error.strerror}); make it writable for root.",
            ) from error
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"Every kernel uid from {self._range.start} to {self._range.stop - 1} is in use; wait for tasks to end.",
        )

    @contextmanager
    def lock_if_unclaimed(self, uid: int, attempt_id: str) -> Iterator[Callable[[], bool]]:
        """Yield a function that returns True while the uid is this attempt's or unclaimed.

        An unclaimed uid cannot be claimed within the context. If another process holds the claim, it can release the
        uid, which can then be claimed for another attempt. To signal a process safely, open its pidfd first, then call
        the function again, then send the signal.
        """
        if attempt_id in self._claims:
            yield lambda: True
            return
        self._ensure_directory()
        descriptor = self._open(uid)
        try:
            is_unclaimed = _try_lock(descriptor)
            yield lambda: is_unclaimed or self.was_last_claimed_by(uid, attempt_id)
        finally:
            os.close(descriptor)

    def was_last_claimed_by(self, uid: int, attempt_id: str) -> bool:
        """Return whether the latest claim of the uid names this attempt."""
        return (self._directory / str(uid)).read_bytes() == attempt_id.encode()

    def find_uid(self, attempt_id: str) -> int | None:
        """Return the uid whose latest claim, by any process, names the attempt, or None if no uid has such a claim."""
        name = attempt_id.encode()
        try:
            claim_files = [path for path in self._directory.iterdir() if path.name.isdigit()]
            return next((int(path.name) for path in claim_files if path.read_bytes() == name), None)
        except OSError:
            return None

    def release(self, attempt_id: str) -> None:
        """Release the attempt's uid, after the last process with this uid has ended.

        Checks that no files are in transit, so that the next sandbox can start without this check. Does nothing if this
        process has not claimed a uid for the attempt.
        """
        uid, descriptor = self._claims.pop(attempt_id, (0, None))
        if descriptor is None:
            return
        try:
            if not sandbox_processes.find_by_uid(uid) and _has_files_in_transit(uid, _RELEASE_CHECK_SECONDS) is False:
                _write_owner(descriptor, _REUSABLE)
        finally:
            os.close(descriptor)

    def has_files_in_transit(self, uid: int, attempt_id: str) -> bool:
        """Return whether files that the attempt's ended processes sent are in transit. Takes 20 ms.

        False if another attempt owns the uid, or if the check fails.
        """
        with self.lock_if_unclaimed(uid, attempt_id) as is_owned:
            return is_owned() and _has_files_in_transit(uid, _RELEASE_CHECK_SECONDS) is True

    def holds_claim(self, uid: int | None, attempt_id: str) -> bool:
        """Return whether this process holds a claim of the uid for the attempt."""
        return attempt_id in self._claims and self._claims[attempt_id][0] == uid

    def __contains__(self, uid: int) -> bool:
        return uid in self._range

    def _iterate_from_offset(self) -> Iterator[int]:
        """Iterate over the range from an offset that depends on the lock directory.

        A container on this host has its own lock directory and cannot see the host's processes, but shares its uids.
        Two ranges that start far apart do not overlap in practice.
        """
        status = self._directory.stat()
        begin = (status.st_dev * 31 + status.st_ino) * _HASH_MULTIPLIER % len(self._range)
        for step in range(len(self._range)):
            yield self._range[(begin + step) % len(self._range)]

    def _try_claim(self, uid: int, attempt_id: str) -> bool:
        descriptor = self._open(uid)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return False
        is_reusable = os.pread(descriptor, len(_REUSABLE) + 1, 0) == _REUSABLE
        # Write the id before checking for processes, so that an earlier owner detects that it has lost the uid.
        _write_owner(descriptor, attempt_id.encode())
        if sandbox_processes.find_by_uid(uid) or (not is_reusable and self._retire_if_files_in_transit(uid)):
            os.close(descriptor)
            return False
        self._claims[attempt_id] = (uid, descriptor)
        return True

    def _retire_if_files_in_transit(self, uid: int) -> bool:
        """Retire a uid that has files in transit, so that later claims try it last. Returns whether it is retired."""
        marker = self._retired_marker(uid)
        if _has_files_in_transit(uid):
            marker.touch()
            return True
        marker.unlink(missing_ok=True)
        return False

    def _retired_marker(self, uid: int) -> Path:
        return self._directory / f"{uid}.retired"

    def _open(self, uid: int) -> int:
        return os.open(self._directory / str(uid), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def _ensure_directory(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        status = self._directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(1, "it is not a directory owned by root with mode 0700")


def _write_owner(descriptor: int, owner: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner, 0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_CLAIM_CHECK_SECONDS, _RELEASE_CHECK_SECONDS = 20.0, 2.0

_SEND_FILE = """
import _socket, errno, posix, resource, sys
first, second = _socket.socketpair()
uid = int(sys.argv[1])
posix.setgroups([])
posix.setresuid(uid, uid, uid)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
try:
    first.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, (2).to_bytes(4, sys.byteorder))])
    second.recvmsg(1)
except OSError as error:
    sys.exit(9 if error.errno == errno.ETOOMANYREFS else 1)
"""
"""Imports only built-in and C modules: with `array`, `os` and `socket`, the program would take twice as long."""


def _has_files_in_transit(uid: int, timeout_seconds: float = _CLAIM_CHECK_SECONDS) -> bool | None:
    """Return whether files that an earlier owner sent over a socket were never received; None if unknown.

    In sockets that contain each other, such files can outlive all processes. The kernel counts them toward the uid's
    limit, so processes of the uid cannot send files. The result is True if the check does not finish in time.
    """
    argv = [sys.executable, "-I", "-S", "-E", "-c", _SEND_FILE, str(uid)]
    try:
        check = subprocess.run(argv, stderr=subprocess.DEVNULL, env={}, check=False, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return True
    return {0: False, 9: True}.get(check.returncode)
