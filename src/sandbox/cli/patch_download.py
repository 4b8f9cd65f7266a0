"""Downloads patches of tasks and of chains of tasks: rejects secrets, prints what a patch omits, counts its lines."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text
from sandbox.cli.output.patches import format_line_counts, patch_lines
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Artifact, Task


def reject_secrets(entries: Iterable[Artifact], *, allows_secrets: bool, advice: str = "add --allow-secrets") -> None:
    """Exit with an error if an artifact contains a secret and `--allow-secrets` was not given.

    advice: how to allow the download.
    """
    names = [escape_name(entry["name"]) for entry in entries if entry["contains_secret"] and not allows_secrets]
    if names:
        contain = "contains a secret of the task and was" if len(names) == 1 else "contain secrets and were"
        message = f"Error: {', '.join(names)} {contain} skipped."
        fail(f"{message}\n  Download it anyway: {advice}", ExitCode.REFUSED)


CHAIN_HELP = "Include the changes of the earlier tasks that this task continues."
"""Help text for the --chain option."""

REMARKS_MAX = 50
"""Maximum number of remarks to print; a server writes fewer."""

_CHAIN_PATCH = ".sandbox/{}.chain.patch"


def fetch_patch(
    client: Client,
    task_id: str,
    target: Path,
    *,
    allows_secrets: bool,
    secrets_advice: str = "add --allow-secrets",
    is_chain: bool = False,
) -> None:
    """Download the task's patch to the file `target` and verify it. Exits with an error if there is none.

    is_chain: download the patch that includes the changes from all tasks in the chain that this task continues.
    """
    path = _CHAIN_PATCH.format(task_id) if is_chain else f".sandbox/{task_id}.patch"
    entries = _patch_entries(client, task_id, path)
    has_ended = not entries and client.status(task_id)["state"] in FINAL_STATES
    if has_ended:
        entries = _patch_entries(client, task_id, path)  # the patch may have been stored in the meantime
    if not entries:
        escaped = escape_text(task_id)
        if has_ended:
            message = f"Error: Task {escaped} has no patch: it ended without one."
            fail(f"{message}\n  See why: sandbox task status {escaped}", ExitCode.NOT_FOUND)
        message = f"Error: Task {escaped} has no patch yet; it is created when the agent has ended."
        fail(f"{message}\n  Wait for it: sandbox task wait {escaped}", ExitCode.NOT_FOUND)
    reject_secrets(entries, allows_secrets=allows_secrets, advice=secrets_advice)
    client.download(task_id, path, target)


def find_chain_patch(client: Client, task_id: str) -> Artifact | None:
    """Return the patch of a task's whole chain: the changes of the task and of earlier tasks. None if there is none."""
    return next(iter(_patch_entries(client, task_id, _CHAIN_PATCH.format(task_id))), None)


def _patch_entries(client: Client, task_id: str, path: str) -> list[Artifact]:
    return [entry for entry in client.artifacts(task_id)["artifacts"] if entry["path"] == path]


def print_omissions(client: Client, task_id: str, patch: Path) -> bool:
    """Print what the server left out of a patch and where to find it; return whether git has anything to apply."""
    remarks = list(islice(takewhile(_is_remark, patch_lines(patch)), REMARKS_MAX))
    if not remarks:
        return bool(patch.stat().st_size)
    lines = ["Not everything is in the patch:", *(f"  {escape_text(line[2:])}" for line in remarks)]
    name = f"{task_id}.changes.tar"
    if any(entry["path"] == f".sandbox/{name}" for entry in client.artifacts(task_id)["artifacts"]):
        lines.append(f"  Download all new and changed files: sandbox task download {escape_text(f'{task_id} {name}')}")
    click.echo("\n".join(lines), err=True)
    return not all(map(_is_remark, patch_lines(patch)))


def _is_remark(line: str) -> bool:
    return line.startswith("# ")


COUNTED_PATCH_BYTES_MAX = 8 * 1024 * 1024
"""Maximum size of a patch that is downloaded only to count its lines."""


def chain_changes_summary(client: Client, task: Task) -> str:
    """Return what the task and the earlier tasks of its chain changed in total, such as `+31 −4 in 3 files`.

    Empty if the task does not continue another one, or if the number of lines cannot be determined.
    """
    from sandbox.client import ClientError

    if task.get("parent") is None or task["state"] not in FINAL_STATES:
        return ""
    try:
        entry = find_chain_patch(client, task["id"])
        if entry is None or entry["contains_secret"] or entry["size_bytes"] > COUNTED_PATCH_BYTES_MAX:
            return ""
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            client.download(task["id"], entry["path"], patch)
            return format_line_counts(patch_lines(patch))
    except ClientError:
        return ""  # the size is only additional information
