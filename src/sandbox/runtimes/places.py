"""The directories of an attempt's disk: made, given to the sandbox's kernel uid, and taken back."""

from contextlib import suppress
from pathlib import Path

from sandbox.contracts.inside import HOME, WORKSPACE
from sandbox.runtimes import ownership

PLACES = {"workspace": WORKSPACE, "home": HOME, "tmp": "/tmp"}  # noqa: S108
"""Directories of an attempt's disk and what they are inside."""


def make_places(disk: Path) -> None:
    """Make those that are not there. Raises OSError."""
    for name in PLACES:
        (disk / name).mkdir(exist_ok=True)
    (disk / "tmp").chmod(0o1777)


def give_places(disk: Path, uid: int, *, was_given: bool = False) -> None:
    """Everything in them becomes this uid's; was_given: an earlier sandbox had them. Raises AttemptError, OSError."""
    for name in PLACES:
        ownership.give_tree(str(disk / name), uid, was_given=was_given)


def take_places(disk: Path) -> None:
    """Everything in them becomes this process's own. Raises OSError."""
    for name in PLACES:
        with suppress(FileNotFoundError):
            ownership.take_tree(str(disk / name))
