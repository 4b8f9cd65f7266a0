"""Shows a task's patch and applies it to the checkout from which the task was started."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.checkout.patch_application import apply_patch, list_changed_files
from sandbox.cli.checkout.user_checkout import Checkout, Head
from sandbox.cli.click_extensions import confirm
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import CliOptions
from sandbox.cli.output.console import escape_text, stderr_console, terminal_height, terminal_width
from sandbox.cli.output.task_outcome import (
    DeniedConnection,
    branch_option,
    can_commit_to_branch,
    closing_lines,
    find_denied_connections,
    has_no_changes,
    task_id_for_hint,
)
from sandbox.cli.patches import (
    ChangedFile,
    applied_message,
    colorize,
    fetch_patch,
    has_diff,
    patch_lines,
    print_changed_files,
    print_omissions,
    show_paged,
    summarize_binary_files,
)

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task

DEFAULT_LINES = 24
DEFAULT_COLUMNS = 80
"""The assumed size of a terminal that does not report its size."""


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

    def run(self, client: Client, status: Task) -> None:
        """Show the changes of the completed task, and apply them if requested."""
        with TemporaryDirectory() as directory:
            patch, task_id = Path(directory) / "patch", status["id"]
            # Suggest `sandbox task apply`: repeating the original command would create another task.
            advice = f"{self.apply_command(task_id)} --allow-secrets"
            fetch_patch(client, task_id, patch, allows_secrets=self.allows_secrets, secrets_advice=advice)
            print_omissions(client, task_id, patch)
            refusals = (0, Counter[DeniedConnection]())
            if self.options.format != "json":
                refusals = find_denied_connections(client, status)
            self._show_and_apply(patch, status, refusals, is_applicable=has_diff(patch))
            if not patch.stat().st_size and not has_no_changes(status) and self.options.format != "json":
                click.echo("The task changed nothing.", err=True)

    def _show_and_apply(
        self, patch: Path, status: Task, refusals: tuple[int, Counter[DeniedConnection]], *, is_applicable: bool
    ) -> None:
        is_empty, task_id = not patch.stat().st_size, status["id"]
        changed = list_changed_files(self.checkout, patch) if is_applicable else []
        is_json = self.options.format == "json"
        applies, head, is_prompted, is_declined = self.should_apply, self.start_head, False, False
        closing = partial(closing_lines, status, *refusals, width_cells=terminal_width(sys.stderr))
        if applies is None and is_applicable and not is_json:
            head = self._warn_if_moved()
            applies = _confirm_apply(patch, changed, task_id, closing(has_message=True), self.options)
            is_prompted, is_declined = applies is not None, applies is False
        blocked_reason = (
            self._blocked_reason(status, head, is_applicable=is_applicable) if applies and not is_empty else None
        )
        is_applied, stages = bool(applies and changed and blocked_reason is None), self._should_stage()
        if is_applied:
            apply_patch(self.checkout, patch, should_stage=stages, advice="\n  ".join(self._other_commands(status)))
        if is_json:
            files = [asdict(file) for file in changed]
            click.echo(json.dumps({"type": "patch", "task_id": task_id, "applied": is_applied, "files": files}))
        if blocked_reason is not None:
            fail(blocked_reason, ExitCode.CONFLICT)
        if not is_json:
            if is_declined:
                click.echo("Nothing was applied.", err=True)
            elif changed and not is_prompted:  # the prompt lists them
                _print_files(changed, self.options)
            self._print_result(status, changed, is_applied=is_applied, is_staged=stages)
            if not is_prompted:  # the prompt includes them
                _print_lines(closing(has_message=False))

    def _should_stage(self) -> bool:
        """Return whether to stage the patch.

        The patch is not staged if the user has other changes, so that the user can tell the two apart.
        """
        return not (self.started_with_local_changes or self.checkout.count_changed())

    def apply_command(self, task_id: str) -> str:
        """Return the command that applies the task's changes later."""
        return f"sandbox task apply {task_id_for_hint(task_id)}{'' if self._should_stage() else ' --beside-changes'}"

    def _warn_if_moved(self) -> Head:
        head = self.checkout.head()
        if head != self.start_head:
            click.echo(self._moved_message(head), err=True)
        return head

    def _blocked_reason(self, status: Task, expected: Head, *, is_applicable: bool) -> str | None:
        """Return why a requested patch is not applied; None if it is applied.

        A different commit or branch requires confirmation.
        """
        if not is_applicable:
            return "Error: The patch contains nothing that git can apply."
        if (head := self.checkout.head()) != expected:
            rows = [("Apply it anyway", self.apply_command(status["id"])), *_commit_row(status)]
            advice = "".join(f"\n  {f'{label}:':<16} {command}" for label, command in rows)
            return f"Error: {self._moved_message(head)} Nothing was applied.{advice}"
        return None

    def _moved_message(self, head: Head) -> str:
        previous, current = _describe_head(self.start_head), _describe_head(head)
        return f"This checkout was at {previous} when the task started, and is at {current} now."

    def _print_result(self, status: Task, changed: list[ChangedFile], *, is_applied: bool, is_staged: bool) -> None:
        lines = []
        if is_applied:
            lines.append(applied_message(len(changed), is_staged=is_staged))
        elif changed:
            diff, *others = self._other_commands(status)
            lines += [
                f"  {diff}",
                f"  Apply:     {self.apply_command(status['id'])}",
                *(f"  {each}" for each in others),
            ]
        if changed:
            lines.append(f'  Continue:  sandbox task continue {task_id_for_hint(status["id"])} "…"')
            click.echo("\n".join(lines), err=True)

    def _other_commands(self, status: Task) -> list[str]:
        """Return the commands that show the changes and, if possible, commit them to a new branch."""
        rows = [("Diff", _diff_command(status["id"])), *_commit_row(status)]
        return [f"{f'{label}:':<10} {command}" for label, command in rows]


def _diff_command(task_id: str) -> str:
    return f"sandbox task diff {task_id_for_hint(task_id)}"


def _commit_row(status: Task) -> list[tuple[str, str]]:
    if not can_commit_to_branch(status):
        return []
    return [("Commit", f"sandbox task apply {task_id_for_hint(status['id'])}{branch_option(status['id'])}")]


def _describe_head(head: Head) -> str:
    commit, branch = head
    return escape_text(f"{commit[:12] if commit else 'no commit'}{f' ({branch})' if branch else ''}")


def _confirm_apply(
    patch: Path, changed: Sequence[ChangedFile], task_id: str, closing: Sequence[str], options: CliOptions
) -> bool | None:
    """Show the changes, and ask whether to apply them; return None without a terminal.

    The patch is shown if everything fits on the screen. closing: lines to print below the changes.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    fits = _fits_on_screen(patch, len(changed) + len(closing) + _PROMPT_LINES)
    click.echo("", err=True)
    if fits:
        for line in _formatted_patch(patch, options):
            click.echo(line, err=True, color=True)
        click.echo("", err=True)
    if changed:
        _print_files(changed, options, has_total=True)
    _print_lines([*([] if fits else [f"  Diff:      {_diff_command(task_id)}"]), *closing])
    pages = not fits and sys.stdout.isatty()
    question = "Apply this to the checkout?"
    try:
        return confirm(
            f"{question} (d: show the diff)" if pages else question,
            show_details=(lambda: show_paged(_formatted_patch(patch, options))) if pages else None,
        )
    except click.Abort:  # ^C, or the terminal was closed: the task itself has succeeded
        click.echo("", err=True)
        return False


_PROMPT_LINES = 5
"""Number of lines besides the patch, the files and the closing lines: empty lines, the total and the question."""


def _formatted_patch(patch: Path, options: CliOptions) -> Iterator[str]:
    return colorize(summarize_binary_files(patch_lines(patch)), has_color=options.has_color)


def _fits_on_screen(patch: Path, other_lines: int) -> bool:
    """Return whether the patch and this number of other lines fit on the terminal."""
    columns, lines_left = terminal_width(sys.stderr) or DEFAULT_COLUMNS, _screen_lines() - other_lines
    for line in summarize_binary_files(patch_lines(patch)):
        lines_left -= 1 + len(line) // columns
        if lines_left < 0:
            return False
    return True


def _screen_lines() -> int:
    return terminal_height(sys.stderr) or DEFAULT_LINES


def _print_files(changed: Sequence[ChangedFile], options: CliOptions, *, has_total: bool = False) -> None:
    """List the changed files. On a terminal, the list takes up at most half of the screen."""
    listed_max = max(_screen_lines() // 2, 1) if sys.stderr.isatty() else len(changed)
    print_changed_files(
        changed, stderr_console(has_color=options.has_color), has_total=has_total, listed_max=listed_max
    )


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line, err=True)
