"""Checks of the host and of the cluster for `sandbox doctor`."""

from dataclasses import dataclass
from ipaddress import ip_address


@dataclass(frozen=True)
class Finding:
    """The result of one check. message: what was found; remedy: how to fix the problem; may be empty.

    blocks_tasks: whether a failed check means that no task can run; otherwise tasks run, but with weaker guarantees.
    short_remedy: the fix in a few words, such as `install git`; may be empty.
    runtime: the runtime that the finding is about; empty if it is about none or several.
    """

    name: str
    ok: bool
    message: str
    remedy: str = ""
    blocks_tasks: bool = True
    short_remedy: str = ""
    runtime: str = ""


def is_loopback_or_unspecified(host: str) -> bool:
    """Return whether only processes of this machine can connect to this address."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
