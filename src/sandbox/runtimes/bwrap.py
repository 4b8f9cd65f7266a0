"""Where bubblewrap is on this machine, and the devices that it lays for everything that it makes."""

import os
from collections.abc import Iterator
from pathlib import Path

from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes.launcher_client import ExecSpec, create_memfd
from sandbox.runtimes.limits import seccomp
from sandbox.runtimes.programs import launcher

_PROGRAMS = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))

DEVICE_ARGUMENTS = ("--dev", "/dev", "--dev-bind", launcher.DEVPTS_DIRECTORY, "/dev/pts")
"""The launcher's terminals over bubblewrap's own, which are not bounded; /dev/ptmx is a link to what is there."""

PROC_ARGUMENTS = ("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev-bind", "/dev/null", "/proc/locks")
"""Made read-only with READ_ONLY_PROC after the last mount below it. While somebody reads /proc/locks, nobody on the
machine can lock a file; so it is empty here.
"""

READ_ONLY_PROC_ARGUMENTS = ("--remount-ro", "/proc")
"""Without it a process could lower its oom_score_adj, which the launcher raised."""


def seccomp_arguments(exec_spec: ExecSpec, *, allows_filters: bool = False) -> Iterator[str]:
    """The filter on system calls. allows_filters: see `seccomp.assemble_filter`."""
    filter_ = seccomp.assemble_filter(os.uname().machine, allows_filters=allows_filters)
    yield from ("--add-seccomp-fd", exec_spec.add_descriptor(create_memfd("filter", filter_)))


def find_bwrap() -> str | None:
    """bubblewrap's path, from fixed places and not from PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


def require_bwrap() -> str:
    """The same. Raises AttemptError (provision_failed) where it is not installed."""
    program = find_bwrap()
    if program is None:
        raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing; install it (package bubblewrap).")
    return program
