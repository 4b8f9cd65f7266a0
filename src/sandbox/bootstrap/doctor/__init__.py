"""Checks of the host for `sandbox doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check. message: what was found; remedy: how to fix the problem; may be empty.

    is_needed: whether a failed check means that no task can run; otherwise tasks run, but with weaker guarantees.
    short_remedy: the fix in a few words, such as `install git`; may be empty.
    runtime: the runtime that the finding is about; empty if it is about none or several.
    """

    name: str
    ok: bool
    message: str
    remedy: str = ""
    is_needed: bool = True
    short_remedy: str = ""
    runtime: str = ""
