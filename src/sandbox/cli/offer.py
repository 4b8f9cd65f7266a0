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

from sandbox.cli.changes import print_changes, told_applied
from sandbox.cli.checkout import ChangedFile, Checkout
from sandbox.cli.console import talk_console
from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail
from sandbox.cli.figures import counted
from sandbox.cli.options import Chosen
from sandbox.cli.patch import fetch_patch, painted, patch_lines, say_missing
from sandbox.cli.visible import visible

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
    place: tuple[str | None, str | None]

    def make(self, client: Client, task_id: str) -> None:
        """Show what changed, and apply it where that is wanted."""
        changed: list[ChangedFile] = []
        applies = self.applies
        # What else is in the index is the user's own business, and stays apart.
        stages = not (self.is_beside or self.checkout.changed())
        command = _command(task_id, is_staged=stages)
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            advice = f"{command} --allow-secrets"  # the same command again would be another task
            fetch_patch(client, task_id, patch, allows_secrets=self.allows_secrets, secrets_advice=advice)
            say_missing(client, task_id, patch)
            if patch.stat().st_size:
                self._require_same_place(command)
                if applies is None and self.options.format != "json":
                    applies = _ask(patch, self.options)
                look = f"Look at it: sandbox task diff {visible(task_id)}"
                changed = (
                    self.checkout.apply(patch, stages=stages, advice=look)
                    if applies
                    else self.checkout.list_changes(patch)
                )
        if self.options.format == "json":
            files = [asdict(file) for file in changed]
            told = {"type": "patch", "task_id": task_id, "applied": bool(applies and changed), "files": files}
            click.echo(json.dumps(told))
            return
        _tell(changed, self.options)
        if changed:
            click.echo(_advice(task_id, len(changed), is_applied=bool(applies), is_staged=stages), err=True)

    def _require_same_place(self, command: str) -> None:
        """Apply nothing unasked to what was checked out meanwhile; who is asked is told."""
        place = self.checkout.place()
        if place == self.place or self.applies is False:
            return
        sentence = f"This checkout was at {_named(self.place)} as the task began, and is at {_named(place)} now."
        if self.applies:
            fail(f"Error: {sentence} Nothing was applied.\n  Apply it all the same: {command}", ExitCode.CONFLICT)
        click.echo(sentence, err=True)


def _named(place: tuple[str | None, str | None]) -> str:
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


def _tell(changed: list[ChangedFile], options: Chosen) -> None:
    if changed:
        print_changes(changed, talk_console(has_color=options.has_color))
    else:
        click.echo("It changed nothing.", err=True)


def _advice(task_id: str, files: int, *, is_applied: bool, is_staged: bool) -> str:
    if not is_applied:
        shown = _command(task_id, is_staged=is_staged)
        return f"  Look at it: sandbox task diff {visible(task_id)}\n  Apply it:   {shown}"
    return told_applied(files, is_staged=is_staged)


def _command(task_id: str, *, is_staged: bool) -> str:
    return f"sandbox task apply {visible(task_id)}{'' if is_staged else ' --beside-changes'}"
