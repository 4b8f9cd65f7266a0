"""Shows a task's patch and applies it to the checkout from which the task was started."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.checkout.downloaded_patch import fetch_patch, print_omissions
from sandbox.cli.checkout.patch_output import (
    applied_message,
    colorize,
    patch_lines,
    print_changed_files,
    summarize_binary_files,
)
from sandbox.cli.checkout.user_checkout import ChangedFile, Checkout, Head
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import CliOptions
from sandbox.cli.output.console import confirm, stderr_console
from sandbox.cli.output.formatting import hint_id, pluralize
from sandbox.cli.output.terminal_text import escape_text

if TYPE_CHECKING:
    from sandbox.client import Client

PREVIEW_LINES_MAX = 200
"""Maximum number of patch lines to show before the prompt."""


@dataclass(frozen=True)
class ApplyPrompt:
    """Prompt to apply a task's patch.

    should_apply: whether to apply the patch; None prompts on the terminal.
    started_with_local_changes: the task started with uncommitted changes, which stay separate from the task's changes.
    start_head: the commit and branch from which the task started.
    """

    checkout: Checkout
    options: CliOptions
    should_apply: bool | None
    allows_secrets: bool
    started_with_local_changes: bool
    start_head: Head

    def run(self, client: Client, task_id: str, *, is_empty_reported: bool = False) -> None:
        """Show the changes, and apply them if requested.

        is_empty_reported: whether the user has been told that there are no changes.
        """
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            # Suggest `sandbox task apply`: repeating the original command would create another task.
            advice = f"{self.apply_command(task_id)} --allow-secrets"
            fetch_patch(client, task_id, patch, allows_secrets=self.allows_secrets, secrets_advice=advice)
            self._show_and_apply(patch, task_id, has_diff=print_omissions(client, task_id, patch))
            if not patch.stat().st_size and not is_empty_reported and self.options.format != "json":
                click.echo("The task changed nothing.", err=True)

    def _show_and_apply(self, patch: Path, task_id: str, *, has_diff: bool) -> None:
        is_empty = not patch.stat().st_size
        changed = self.checkout.list_changed_files(patch) if has_diff else []
        is_json = self.options.format == "json"
        applies, head, is_prompted, is_declined = self.should_apply, self.start_head, False, False
        if applies is None and has_diff and not is_json:
            head = self._warn_if_moved()
            applies = _confirm_apply(patch, changed, self.options)
            is_prompted, is_declined = applies is not None, applies is False
        blocked_reason = self._blocked_reason(task_id, head, has_diff=has_diff) if applies and not is_empty else None
        is_applied, stages = bool(applies and changed and blocked_reason is None), self._should_stage()
        if is_applied:
            self.checkout.apply(patch, should_stage=stages, advice=_diff_hint(task_id))
        if is_json:
            files = [asdict(file) for file in changed]
            click.echo(json.dumps({"type": "patch", "task_id": task_id, "applied": is_applied, "files": files}))
        if blocked_reason is not None:
            fail(blocked_reason, ExitCode.CONFLICT)
        if not is_json:
            if is_declined:
                click.echo("Nothing was applied.", err=True)
            elif changed and not is_prompted:  # the prompt lists them
                print_changed_files(changed, stderr_console(has_color=self.options.has_color))
            self._print_result(task_id, changed, is_applied=is_applied, is_staged=stages)

    def _should_stage(self) -> bool:
        """Return whether to stage the patch.

        The patch is not staged if the user has other changes, so that the user can tell the two apart.
        """
        return not (self.started_with_local_changes or self.checkout.count_changed())

    def apply_command(self, task_id: str) -> str:
        """Return the command that applies the task's changes later."""
        return f"sandbox task apply {hint_id(task_id)}{'' if self._should_stage() else ' --beside-changes'}"

    def _warn_if_moved(self) -> Head:
        head = self.checkout.head()
        if head != self.start_head:
            click.echo(self._moved_message(head), err=True)
        return head

    def _blocked_reason(self, task_id: str, expected: Head, *, has_diff: bool) -> str | None:
        """Return why a requested patch is not applied; None if it is applied.

        A different commit or branch requires confirmation.
        """
        if not has_diff:
            return "Error: The patch contains nothing that git can apply."
        if (head := self.checkout.head()) != expected:
            advice = f"Apply it anyway: {self.apply_command(task_id)}"
            return f"Error: {self._moved_message(head)} Nothing was applied.\n  {advice}"
        return None

    def _moved_message(self, head: Head) -> str:
        previous, current = _describe_head(self.start_head), _describe_head(head)
        return f"This checkout was at {previous} when the task started, and is at {current} now."

    def _print_result(self, task_id: str, changed: list[ChangedFile], *, is_applied: bool, is_staged: bool) -> None:
        lines = []
        if is_applied:
            lines.append(applied_message(len(changed), is_staged=is_staged))
        elif changed:
            lines += [f"  {_diff_hint(task_id)}", f"  Apply:     {self.apply_command(task_id)}"]
        if changed:
            lines.append(f'  Continue:  sandbox task continue {hint_id(task_id)} "…"')
            click.echo("\n".join(lines), err=True)


def _diff_hint(task_id: str) -> str:
    return f"Diff:      sandbox task diff {hint_id(task_id)}"


def _describe_head(head: Head) -> str:
    commit, branch = head
    return escape_text(f"{commit[:12] if commit else 'no commit'}{f' ({branch})' if branch else ''}")


def _confirm_apply(patch: Path, changed: Sequence[ChangedFile], options: CliOptions) -> bool | None:
    """Show the patch and the changed files, and ask whether to apply it; return None without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    lines = summarize_binary_files(patch_lines(patch))
    click.echo("", err=True)
    for line in colorize(islice(lines, PREVIEW_LINES_MAX), has_color=options.has_color):
        click.echo(line, err=True, color=True)
    if more := sum(1 for _ in lines):
        click.echo(f"… {pluralize(more, 'more line')}", err=True)
    if changed:
        click.echo("", err=True)
        print_changed_files(changed, stderr_console(has_color=options.has_color), has_total=True)
    try:
        return confirm("Apply this to the checkout?")
    except click.Abort:  # ^C, or the terminal was closed: the task itself has succeeded
        click.echo("", err=True)
        return False
