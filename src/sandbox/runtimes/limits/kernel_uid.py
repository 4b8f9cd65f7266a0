"""A kernel uid of its own for every sandbox, claimed machine-wide.

A claim is a lock on a file that the claiming process holds until it gives the uid back or dies. The file names
the attempt, so that another process can tell whose the uid is.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import processes

LOCK_DIRECTORY = Path("/run/sandbox-uids")
SANDBOX_UIDS = range(1_900_000_000, 1_900_065_000)
"""Uids that nobody else hands out: past the subordinate ones of login.defs (up to 600,100,000), which the containers of
the machine's users run with, and past those of systemd's containers (up to 1,879,048,191)."""

FILES_UIDS_OFFSET = 100_000
"""From a kernel uid to that of its sandbox's files, in runtimes whose sandboxes have two: the claim holds both."""

_HASH_MULTIPLIER = 2_654_435_761
"""A prime near 2**32 divided by the golden ratio: neighbouring directories land far apart."""


class KernelUidPool:
    """The uids of a range, for root only: an ordinary user has but one."""

    def __init__(self, uid_range: range, directory: Path = LOCK_DIRECTORY) -> None:
        self._range = uid_range
        self._directory = directory
        self._allocations: dict[str, tuple[int, int]] = {}

    def allocate(self, attempt_id: str) -> int:
        """A uid that nobody has claimed and no process has. Raises AttemptError (provision_failed)."""
        if attempt_id in self._allocations:
            return self._allocations[attempt_id][0]
        try:
            self._ensure_directory()
            for uid in self._iterate_from_offset():
                if self._try_allocate(uid, attempt_id):
                    return uid
        except OSError as error:
            raise AttemptError(
                FailureCode.PROVISION_FAILED,
                f"No kernel uid could be claimed in {self._directory} ({error.strerror}); make it writable for root.",
            ) from error
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"Every kernel uid from {self._range.start} to {self._range.stop - 1} is in use; wait for tasks to end.",
        )

    @contextmanager
    def guard_ownership(self, uid: int, attempt_id: str) -> Iterator[Callable[[], bool]]:
        """A question that is answered with yes as long as the uid is this attempt's, or nobody's.

        Nobody's uid cannot be claimed meanwhile. Another living process's claim can end and the uid become another
        attempt's, so ask again when a process that has it is held by a pidfd, and only then signal it.
        """
        if attempt_id in self._allocations:
            yield lambda: True
            return
        self._ensure_directory()
        descriptor = self._open(uid)
        try:
            is_nobodys = _try_lock(descriptor)
            yield lambda: is_nobodys or self.is_allocated_to(uid, attempt_id)
        finally:
            os.close(descriptor)

    def is_allocated_to(self, uid: int, attempt_id: str) -> bool:
        """The last claim of the uid is this attempt's."""
        return (self._directory / str(uid)).read_bytes() == attempt_id.encode()

    def find_uid(self, attempt_id: str) -> int | None:
        """The uid whose last claim names the attempt, whoever made it; None where there is none."""
        name = attempt_id.encode()
        try:
            claims = [path for path in self._directory.iterdir() if path.name.isdigit()]
            return next((int(path.name) for path in claims if path.read_bytes() == name), None)
        except OSError:
            return None

    def release(self, attempt_id: str) -> None:
        """Give the uid back; nothing happens when this process has not claimed one for the attempt."""
        _, descriptor = self._allocations.pop(attempt_id, (0, None))
        if descriptor is not None:
            os.close(descriptor)

    def has_allocated(self, uid: int | None, attempt_id: str) -> bool:
        """This process has claimed the uid for the attempt."""
        return attempt_id in self._allocations and self._allocations[attempt_id][0] == uid

    def __contains__(self, uid: int) -> bool:
        return uid in self._range

    def _iterate_from_offset(self) -> Iterator[int]:
        """The range, begun at a place that belongs to this lock directory.

        A container beside this host has a lock directory of its own and cannot see the host's processes, yet shares
        its uids: two that begin far apart do not meet in practice.
        """
        status = self._directory.stat()
        begin = (status.st_dev * 31 + status.st_ino) * _HASH_MULTIPLIER % len(self._range)
        for step in range(len(self._range)):
            yield self._range[(begin + step) % len(self._range)]

    def _try_allocate(self, uid: int, attempt_id: str) -> bool:
        descriptor = self._open(uid)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return False
        # Named before it is looked at, so that whoever reads the old name after this knows that it lost the uid.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, attempt_id.encode(), 0)
        if processes.find_by_uid(uid):
            os.close(descriptor)
            return False
        self._allocations[attempt_id] = (uid, descriptor)
        return True

    def _open(self, uid: int) -> int:
        return os.open(self._directory / str(uid), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def _ensure_directory(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        status = self._directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(1, "it is not a directory of root's own, mode 0700")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
