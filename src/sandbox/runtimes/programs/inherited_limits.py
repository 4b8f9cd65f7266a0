"""Limits that every program in a sandbox inherits.

The programs in this directory import this module too, so it must not import the package.
"""

import resource

_signal = __import__("_signal")  # built in, and unknown to type checkers

OPEN_FILES_SOFT_MAX = 4096
OPEN_FILES_MAX = 16384
"""Soft and hard limits on the open files of one process. The machine's limit for all processes is fs.file-max."""

HOST_PROGRAM_FILES_MAX = 1024 * 1024
"""Maximum number of open files of a host program that runs a separate kernel, such as QEMU.

Without it, the host's limit applies, which can be a billion. To list a descriptor table, the kernel walks all of its
entries, including unused ones: the table is as large as the highest descriptor that the program has used.
"""

SIGNALS_MAX = 1024
MESSAGE_QUEUE_BYTES_MAX = 819200
"""Limits on timers and pending signals, and on bytes in POSIX message queues.

If the server runs as root, they apply to each sandbox; otherwise, to the total of all processes of the user. All timers
that end at the same time send their signals in one interrupt, and each signal walks all waiters of a signalfd.
"""

_LIMITS = (
    (resource.RLIMIT_SIGPENDING, SIGNALS_MAX),
    (resource.RLIMIT_MSGQUEUE, MESSAGE_QUEUE_BYTES_MAX),
    (resource.RLIMIT_RTPRIO, 0),  # a real-time process would starve others: control groups do not limit it
    (resource.RLIMIT_NICE, 0),
)


def apply_process_limits() -> None:
    """Apply the settings that the command inherits: limits, default signal handling, no core dumps, the OOM score.

    Does not limit open files. The core limit is one byte, because a core_pattern with a pipe ignores a limit of zero.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    lower_limits()
    with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def limit_open_files() -> None:
    """Limit open files for this process and its descendants. A lower hard limit is not raised."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, OPEN_FILES_SOFT_MAX), limit))


def limit_host_program_files() -> None:
    """Limit open files for this process and its descendants to HOST_PROGRAM_FILES_MAX. Lower limits are kept."""
    soft, hard = (
        HOST_PROGRAM_FILES_MAX if limit == resource.RLIM_INFINITY else min(limit, HOST_PROGRAM_FILES_MAX)
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lower_limits() -> None:
    """Lower the limits in `_LIMITS`."""
    for kind, value_max in _LIMITS:
        lower_limit(kind, value_max)


def lower_limit(kind: int, value_max: int) -> None:
    """Set the soft and hard limit to `value_max`. A lower hard limit is not raised."""
    _, hard = resource.getrlimit(kind)
    bound = value_max if hard == resource.RLIM_INFINITY else min(hard, value_max)
    resource.setrlimit(kind, (bound, bound))
