"""Limits that every program of a sandbox inherits. Also imported by programs of this folder, without the package."""

import resource

_signal = __import__("_signal")  # built in, and unknown to type checkers

OPEN_FILES_SOFT_MAX = 4096
OPEN_FILES_MAX = 16384
"""Open in one process: what it begins with, and what it may ask for. All together the machine has fs.file-max."""

SIGNALS_MAX = 8192
MESSAGE_QUEUE_BYTES_MAX = 819200
"""Timers and queued signals, and bytes in POSIX message queues: of a sandbox as root, else of all of the user's."""

_LIMITS = (
    (resource.RLIMIT_SIGPENDING, SIGNALS_MAX),
    (resource.RLIMIT_MSGQUEUE, MESSAGE_QUEUE_BYTES_MAX),
    (resource.RLIMIT_RTPRIO, 0),  # a real-time process is not bounded by the control group and starves the others
    (resource.RLIMIT_NICE, 0),
)


def apply_process_limits(*, limits_open_files: bool) -> None:
    """What the command inherits: no core dumps, the first to go when the host is out of memory, plain signals.

    One byte and not none, because a core_pattern with a pipe takes no notice of none.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    if limits_open_files:
        limit_open_files()
    lower_limits()
    with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def limit_open_files() -> None:
    """For this process and all that come of it. Where less may be asked for already, that stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, OPEN_FILES_SOFT_MAX), limit))


def lower_limits() -> None:
    """Those of `_LIMITS`."""
    for kind, most in _LIMITS:
        lower_limit(kind, most)


def lower_limit(kind: int, value_max: int) -> None:
    """Where less may be asked for already, that stays."""
    _, hard = resource.getrlimit(kind)
    bound = value_max if hard == resource.RLIM_INFINITY else min(hard, value_max)
    resource.setrlimit(kind, (bound, bound))
