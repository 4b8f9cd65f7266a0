"""Software that queues and runs workers on a cluster: Slurm, Kubernetes, and a stand-in that starts local processes."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from sandbox.interfaces.cluster_engine import JOB_NAME_PATTERN
from sandbox.model.resources import Resources

_JOB_NAME = re.compile(JOB_NAME_PATTERN)


def is_job_name(name: str) -> bool:
    """Return whether this is a valid job name. Names become parts of paths and of arguments."""
    return _JOB_NAME.fullmatch(name) is not None


def check_job_name(name: str) -> str:
    """Return the name. Raises ValueError if it is not a valid job name."""
    if not is_job_name(name):
        raise ValueError(f"not the name of a job: {name!r}")
    return name


def keep_largest(sizes: Iterable[Resources]) -> Sequence[Resources]:
    """Return the sizes that no other size matches or exceeds in every resource, sorted by descending number of CPUs.

    Sizes are visited in this order. `frontier` contains the largest pairs of memory and disk among the visited sizes,
    sorted by ascending memory and descending disk. A size is omitted if the first pair with at least as much memory
    also has at least as much disk.
    """
    result: list[Resources] = []
    frontier: list[tuple[int, int]] = []
    for size in sorted({*sizes}, key=lambda size: (size.cpus, size.memory_bytes, size.disk_bytes), reverse=True):
        position = bisect_left(frontier, (size.memory_bytes, 0))
        if position < len(frontier) and frontier[position][1] >= size.disk_bytes:
            continue
        result.append(size)
        end = bisect_right(frontier, size.memory_bytes, key=lambda pair: pair[0])
        begin = position
        while begin > 0 and frontier[begin - 1][1] <= size.disk_bytes:
            begin -= 1
        frontier[begin:end] = [(size.memory_bytes, size.disk_bytes)]
    return result
