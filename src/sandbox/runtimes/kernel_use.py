"""What the kernel holds for a sandbox and charges to no control group, as far as it can be counted from outside."""

from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path

from sandbox.model.limits import FILE_LOCKS_MAX

_LOCKS = Path("/proc/locks")
_NETLINK_QUEUE_COLUMN = 4


def count_sockets(pid: int) -> int | None:
    """All that live in the network namespace of a process: open, not accepted, and closed with data on the way.

    None where the process has ended.
    """
    try:
        text = Path(f"/proc/{pid}/net/sockstat").read_text()
    except OSError:
        return None
    return int(text.split(maxsplit=3)[2])


def count_netlink_bytes(pid: int) -> int | None:
    """What waits in the netlink sockets of that network namespace to be read. None where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/net/netlink").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[_NETLINK_QUEUE_COLUMN]) for line in lines[1:])


def count_file_locks(process_ids: Callable[[], Collection[int]]) -> int | None:
    """POSIX locks of these processes; 0 while the whole machine has no more than FILE_LOCKS_MAX of them.

    Reads twice as many lines at most, since the time that the kernel takes grows with the square of their number: of
    more locks on the machine only the first in its list count. None where it lists none.
    """
    try:
        with _LOCKS.open() as file:
            lines = list(islice(file, 2 * FILE_LOCKS_MAX))
    except OSError:
        return None
    if len(lines) <= FILE_LOCKS_MAX:
        return 0
    ours = {str(pid) for pid in process_ids()}
    return sum(1 for line in lines if not ours.isdisjoint(line.split()[4:6]))
