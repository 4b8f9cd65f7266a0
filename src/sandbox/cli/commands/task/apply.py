"""The command `sandbox task apply`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.checkout.patch import applied_message, fetch_patch, print_changed_files, print_omissions
from sandbox.cli.checkout.worktree import ChangedFile, Checkout
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.help_examples import help_examples
from sandbox.cli.options import CliOptions, common_options, current_options, task_argument
from sandbox.cli.output.console import stdout_console
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import escape_text
from sandbox.cli.secret_guard import allow_secrets_option

if TYPE_CHECKING:
    from sandbox.client import Client

METADATA_BYTES_MAX = 64 * 1024 * 1024
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@click.command(
    epilog=help_examples(
        "sandbox task apply 5e173eb5",
        "sandbox task apply 5e173eb5 --beside-changes",
        note="Without --beside-changes, the changes are staged; undo them with: git reset --hard",
    )
)
@task_argument
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="The checkout [default: the current directory].",
)
@click.option(
    "--beside-changes",
    "allows_local_changes",
    is_flag=True,
    help="Apply on top of uncommitted changes, and stage nothing.",
)
@allow_secrets_option
@common_options
def apply(task_id: str, directory: Path, allows_local_changes: bool, allows_secrets: bool) -> None:
    """Apply a task's changes to a git checkout.

    The checkout must have no uncommitted changes, unless --beside-changes is given. The patch is applied completely or
    not at all.
    """
    options, checkout = current_options(), Checkout(directory)
    if not allows_local_changes:
        checkout.require_clean()
    with TemporaryDirectory() as temporary:
        patch = Path(temporary) / "patch"
        with options.connect() as client:
            fetch_patch(client, task_id, patch, allows_secrets=allows_secrets)
            if not print_omissions(client, task_id, patch) and patch.stat().st_size:
                fail("Error: The patch contains nothing that git can apply.", ExitCode.CONFLICT)
            base = _base_commit(client, task_id, Path(temporary) / "metadata.json")
        commit = checkout.commit()
        if base and base != commit:
            head_description = f"this checkout is at {commit[:12]}" if commit else "this checkout has no commit yet"
            click.echo(f"The patch was made on commit {base[:12]}; {head_description}.", err=True)
        changed = checkout.apply(patch, should_stage=not allows_local_changes) if patch.stat().st_size else []
    if options.format == "json":
        files = [asdict(file) for file in changed]
        print_json(
            {"task_id": task_id, "directory": str(checkout.root), "base_commit": base, "commit": commit, "files": files}
        )
    else:
        _print_result(task_id, changed, options, is_staged=not allows_local_changes)


def _base_commit(client: Client, task_id: str, file: Path) -> str | None:
    """Return the base commit from the task's metadata, or None if it is missing or not accessible."""
    import json

    from sandbox.client import ArtifactContainsSecretError, ArtifactNotFoundError, ForbiddenError

    try:
        client.download(task_id, ".sandbox/metadata.json", file)
    except (ArtifactContainsSecretError, ArtifactNotFoundError, ForbiddenError):
        return None
    try:
        metadata = json.loads(file.read_bytes()) if file.stat().st_size <= METADATA_BYTES_MAX else None
    except (ValueError, RecursionError):
        return None
    match metadata:
        case {"repository": {"base_commit": str(commit)}} if _COMMIT.fullmatch(commit):
            return commit
    return None


def _print_result(task_id: str, changed: Sequence[ChangedFile], options: CliOptions, *, is_staged: bool) -> None:
    if not changed:
        click.echo(f"Task {escape_text(task_id)} changed nothing, so nothing was applied.", err=True)
        return
    print_changed_files(changed, stdout_console(has_color=options.has_color))
    click.echo(applied_message(len(changed), is_staged=is_staged), err=True)
