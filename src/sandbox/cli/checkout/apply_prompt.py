"""What a task changed, offered to the checkout that it was started from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.checkout.worktree import ChangedFile, Checkout, Place
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import Chosen
from sandbox.cli.output.console import talk_console
from sandbox.cli.output.formatting import counted
from sandbox.cli.output.patch import fetch_patch, painted, patch_lines, print_changes, say_missing, told_applied
from sandbox.cli.output.text import visible

if TYPE_CHECKING:
    from sandbox.client import Client

SHOWN_LINES_MAX = 200
"""Of the patch, before it is asked whether to apply it."""


@dataclass(frozen=True)
class Offer:
    """applies: whether the patch is wanted in the checkout; None: a terminal is asked.

    is_beside: the task began with changes that are not committed, which stay apart from its own. place: the commit and
    branch that it began at.
    """

    checkout: Checkout
    options: Chosen
    applies: bool | None
    allows_secrets: bool
    is_beside: bool
    place: Place

    def make(self, client: Client, task_id: str) -> None:
        """Show what changed, and apply it where that is wanted."""
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            advice = f"{self._command(task_id)} --allow-secrets"  # the same command again would be another task
            fetch_patch(client, task_id, patch, allows_secrets=self.allows_secrets, secrets_advice=advice)
            self._deal_with(patch, task_id, holds_diffs=say_missing(client, task_id, patch))

    def _deal_with(self, patch: Path, task_id: str, *, holds_diffs: bool) -> None:
        is_empty = not patch.stat().st_size
        changed = self.checkout.list_changes(patch) if holds_diffs else []
        is_json = self.options.format == "json"
        applies, place = self.applies, self.place
        if applies is None and holds_diffs and not is_json:
            place = self._say_other_place()
            applies = _ask(patch, self.options)
        obstacle = self._obstacle(task_id, place, holds_diffs=holds_diffs) if applies and not is_empty else None
        is_applied, stages = bool(applies and changed and obstacle is None), self._stages()
        if is_applied:
            self.checkout.apply(patch, stages=stages, advice=_look(task_id))
        if is_json:
            files = [asdict(file) for file in changed]
            click.echo(json.dumps({"type": "patch", "task_id": task_id, "applied": is_applied, "files": files}))
        if obstacle is not None:
            fail(obstacle, ExitCode.CONFLICT)
        if not is_json:
            self._tell(task_id, changed, is_empty=is_empty, is_applied=is_applied, is_staged=stages)

    def _stages(self) -> bool:
        """What else is in the index is the user's own business, and stays apart."""
        return not (self.is_beside or self.checkout.changed())

    def _command(self, task_id: str) -> str:
        return f"sandbox task apply {visible(task_id)}{'' if self._stages() else ' --beside-changes'}"

    def _say_other_place(self) -> Place:
        place = self.checkout.place()
        if place != self.place:
            click.echo(self._moved(place), err=True)
        return place

    def _obstacle(self, task_id: str, expected: Place, *, holds_diffs: bool) -> str | None:
        """Why nothing is applied, though it is wanted: nothing goes unasked to what was checked out meanwhile."""
        if not holds_diffs:
            return "Error: Nothing is in the patch that git could apply."
        if (place := self.checkout.place()) != expected:
            advice = f"Apply it all the same: {self._command(task_id)}"
            return f"Error: {self._moved(place)} Nothing was applied.\n  {advice}"
        return None

    def _moved(self, place: Place) -> str:
        return f"This checkout was at {_named(self.place)} as the task began, and is at {_named(place)} now."

    def _tell(
        self, task_id: str, changed: list[ChangedFile], *, is_empty: bool, is_applied: bool, is_staged: bool
    ) -> None:
        if changed:
            print_changes(changed, talk_console(has_color=self.options.has_color))
        if is_applied:
            click.echo(told_applied(len(changed), is_staged=is_staged), err=True)
        elif changed:
            click.echo(f"  {_look(task_id)}\n  Apply it:   {self._command(task_id)}", err=True)
        elif is_empty:
            click.echo("It changed nothing.", err=True)


def _look(task_id: str) -> str:
    return f"Look at it: sandbox task diff {visible(task_id)}"


def _named(place: Place) -> str:
    commit, branch = place
    return visible(f"{commit[:12] if commit else 'no commit'}{f' ({branch})' if branch else ''}")


def _ask(patch: Path, options: Chosen) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    lines = patch_lines(patch)
    click.echo("", err=True)
    for line in painted(islice(lines, SHOWN_LINES_MAX), has_color=options.has_color):
        click.echo(line, err=True, color=True)
    if more := sum(1 for _ in lines):
        click.echo(f"… {counted(more, 'more line')}", err=True)
    try:
        return click.confirm("Apply this to the checkout?", default=None, err=True)
    except click.Abort:  # ^C, or the end of the terminal: the task is done all the same
        click.echo("", err=True)
        return False
