"""What the kernel holds for a sandbox and charges to no control group, as far as it can be counted from outside."""

from pathlib import Path

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
