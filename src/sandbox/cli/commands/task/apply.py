"""The `sandbox task apply` command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sandbox.cli.checkout.branch_commit import CommittedTask, NewBranch, build_chain_message, build_commit_message
from sandbox.cli.checkout.patch_application import apply_patch, can_apply, list_changed_files
from sandbox.cli.checkout.user_checkout import Checkout
from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import CliOptions, allow_secrets_option, common_options, current_options
from sandbox.cli.output.console import escape_text, print_json, print_message, stdout_console
from sandbox.cli.patches import (
    CHAIN_HELP,
    ChangedFile,
    applied_message,
    fetch_patch,
    find_chain_patch,
    has_diff,
    print_changed_files,
    print_omissions,
)
from sandbox.cli.task_arguments import task_argument

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task

COMMIT_MESSAGE_TASKS_MAX = 100
"""Maximum number of a chain's tasks that are named in a commit message."""

_BRANCH_ADVICE = "Commit the changes to a new branch: add --branch NAME"
METADATA_BYTES_MAX = 64 * 1024 * 1024
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@command(
    epilog=help_examples(
        "sandbox task apply 5e173eb5",
        "sandbox task apply 5e173eb5 --branch fix/basket --push",
        "sandbox task apply 5e173eb5 --chain",
        note="Without --beside-changes or --branch, the changes are staged. Undo the changes with: git reset --hard",
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
@click.option("--chain", "includes_chain", is_flag=True, help=CHAIN_HELP)
@click.option(
    "--branch", "name", metavar="NAME", help="Commit the changes to this new branch; leave the working tree unchanged."
)
@click.option(
    "--commit", "commits", is_flag=True, help="Commit the changes. Requires --branch, which already implies it."
)
@click.option("--push", "pushes", is_flag=True, help="With --branch: push the branch, with your git credentials.")
@click.option(
    "--remote",
    metavar="NAME",
    help="With --branch: the remote to push to and fetch from [default for push: remote.pushDefault, then origin].",
)
@allow_secrets_option
@common_options
def apply(
    task_id: str,
    directory: Path,
    allows_local_changes: bool,
    includes_chain: bool,
    allows_secrets: bool,
    **branch_options: Any,
) -> None:
    """Apply a task's changes to a git checkout.

    The checkout must have no uncommitted changes, unless --beside-changes is given. The patch is applied completely or
    not at all.

    With --branch NAME, the changes are committed to a new branch, which starts at the task's commit. The working tree
    and the current branch do not change. The task's name becomes the subject of the commit, cut to 72 characters, and
    the agent's final message becomes the body. The changes of a chain of tasks become one commit, named after the first
    task, with one line for each task.
    """
    options, checkout = current_options(), Checkout(directory)
    branch = _new_branch(checkout, **branch_options, allows_local_changes=allows_local_changes)
    if branch is None and not allows_local_changes:
        checkout.require_clean()
    with TemporaryDirectory() as temporary, options.connect() as client:
        patch = Path(temporary) / "patch"
        status = client.status(task_id) if branch is not None or includes_chain else None
        # If a task continues another one, the commit from which it started exists only on the server.
        is_chain = status is not None and status.get("parent") is not None
        fetch_patch(client, task_id, patch, allows_secrets=allows_secrets, is_chain=is_chain)
        _check_applicable(client, task_id, patch)
        base = _base_commit(client, task_id, Path(temporary) / "metadata.json")
        if status is not None and is_chain:
            base = _commit_or_none(status["definition"].get("repository", {}).get("commit"))
        task = _Task(task_id, base, patch)
        if branch is not None and status is not None:
            tasks = _chain_of(client, status)
            _apply_to_branch(branch, task, status, tasks, options, pushes=branch_options["pushes"])
            return
        is_staged, advice, note, other = not allows_local_changes, "", "", Path(temporary) / "other"
        if is_chain and not can_apply(checkout, patch, should_stage=is_staged):
            fetch_patch(client, task_id, other, allows_secrets=allows_secrets)
            if can_apply(checkout, other, should_stage=is_staged):
                advice = "The earlier changes are already here: leave out --chain"
        elif status is None and base and base != checkout.current_commit():
            note = _chain_note(client, checkout, task, other, is_staged=is_staged)
            if note and not can_apply(checkout, patch, should_stage=is_staged):
                note, advice = "", note
        _apply_to_worktree(checkout, task, options, is_staged=is_staged, advice=advice or _BRANCH_ADVICE)
        if note:
            click.echo(note, err=True)


def _check_applicable(client: Client, task_id: str, patch: Path) -> None:
    print_omissions(client, task_id, patch)
    if patch.stat().st_size and not has_diff(patch):
        fail("Error: The patch contains nothing that git can apply.", ExitCode.CONFLICT)


class _Task(NamedTuple):
    id: str
    base: str | None
    patch: Path


def _new_branch(
    checkout: Checkout, *, name: str | None, commits: bool, pushes: bool, remote: str | None, allows_local_changes: bool
) -> NewBranch | None:
    """Return the branch to create; None for the working tree."""
    if name is None:
        if commits or pushes or remote:
            raise click.UsageError("Name the new branch: add --branch NAME")
        return None
    if allows_local_changes:
        raise click.UsageError("Leave out --beside-changes: with --branch, the working tree is not changed.")
    branch = NewBranch(checkout, name, remote)
    branch.require_available()
    return branch


def _chain_note(client: Client, checkout: Checkout, task: _Task, target: Path, *, is_staged: bool) -> str:
    """If the task continues another one, return how to apply the changes of the whole chain; otherwise an empty string.

    The result is also empty if the checkout already has the earlier changes: then the task's patch applies, and the
    patch of the chain does not. target: a file for the patch of the chain.
    """
    entry = find_chain_patch(client, task.id)
    if entry is None:
        return ""
    if can_apply(checkout, task.patch, should_stage=is_staged) and not entry["contains_secret"]:
        client.download(task.id, entry["path"], target)
        if not can_apply(checkout, target, should_stage=is_staged):
            return ""
    message = "The patch does not contain the changes of the earlier tasks that this one continues."
    return f"{message}\n  Apply all: sandbox task apply {escape_text(task.id)} --chain"


def _apply_to_worktree(checkout: Checkout, task: _Task, options: CliOptions, *, is_staged: bool, advice: str) -> None:
    commit = checkout.current_commit()
    if task.base and task.base != commit:
        head_description = f"this checkout is at {commit[:12]}" if commit else "this checkout has no commit yet"
        click.echo(f"The patch was made on commit {task.base[:12]}; {head_description}.", err=True)
    changed = (
        apply_patch(checkout, task.patch, should_stage=is_staged, advice=advice) if task.patch.stat().st_size else []
    )
    if options.format == "json":
        print_json(_json_fields(checkout, task, commit, changed))
    elif _print_changed_files(task, changed, options):
        click.echo(applied_message(len(changed), is_staged=is_staged), err=True)


def _chain_of(client: Client, status: Task) -> Sequence[CommittedTask]:
    """Return the task and the earlier tasks that it continues, in the order in which they ran.

    Earlier tasks may have been removed.
    """
    from sandbox.client import ForbiddenError, TaskNotFoundError

    found = {status["id"]: status}
    parent = status.get("parent")
    while parent is not None and parent not in found and len(found) < COMMIT_MESSAGE_TASKS_MAX:
        try:
            found[parent] = earlier = client.status(parent)
        except (ForbiddenError, TaskNotFoundError):
            break
        parent = earlier.get("parent")
    return [_committed_task(each) for each in reversed(found.values())]


def _committed_task(status: Task) -> CommittedTask:
    # The message of a failed agent describes the error. Older servers do not send the message.
    final_message = "" if status["error"] else status.get("final_message") or ""
    return CommittedTask(status["id"], status["name"], final_message)


def _apply_to_branch(
    branch: NewBranch,
    task: _Task,
    status: Task,
    tasks: Sequence[CommittedTask],
    options: CliOptions,
    *,
    pushes: bool,
) -> None:
    """Commit the changes to the branch. tasks: the tasks that made the changes."""
    checkout = branch.checkout
    changed = list_changed_files(checkout, task.patch) if task.patch.stat().st_size else []
    head = checkout.current_commit()
    created: dict[str, Any] | None = None
    if changed:
        base = _fetch_base(branch, task, status["definition"].get("repository", {}))
        message = build_commit_message(tasks[0]) if len(tasks) == 1 else build_chain_message(tasks)
        commit = branch.commit(base, task.patch, message)
        pushed_to, url = branch.push(commit) if pushes else (None, None)
        created = {"name": branch.name, "commit": commit, "pushed_to": pushed_to, "pull_request_url": url}
    if options.format == "json":
        print_json({**_json_fields(checkout, task, head, changed), "branch": created})
    elif _print_changed_files(task, changed, options) and created is not None:
        print_message(_branch_message(branch, created, len(tasks)))


def _fetch_base(branch: NewBranch, task: _Task, repository: Mapping[str, Any]) -> str:
    """Return the base commit after fetching it if necessary."""
    other = f"  Apply the patch to your files instead: sandbox task apply {escape_text(task.id)}"
    if task.base is None:
        fail(f"Error: The commit from which the task started is not known.\n{other}", ExitCode.CONFLICT)
    if repository.get("patch"):
        message = "Error: The task started with changes that were not pushed, so no branch can start from its commit."
        fail(f"{message}\n{other} --beside-changes", ExitCode.CONFLICT)
    branch.fetch_missing(task.base, str(repository.get("url", "")), str(repository.get("branch", "")))
    return task.base


def _branch_message(branch: NewBranch, created: Mapping[str, Any], tasks: int) -> str:
    remote = created["pushed_to"]
    pushed = f", and pushed to {escape_text(remote)}" if remote else ""
    subject = "Committed" if tasks == 1 else f"Committed the changes of {tasks} tasks"
    commit = f"{subject} to the new branch {escape_text(branch.name)} as {created['commit'][:12]}{pushed}."
    if created["pull_request_url"]:
        return f"{commit}\n  Open a pull request: {escape_text(created['pull_request_url'])}"
    if remote:
        return commit
    name = shlex.quote(branch.name)
    push = shlex.join(["git", "push", "-u", branch.remote or "origin", branch.name])
    return f"{commit} Your working tree did not change.\n  See it:  git show {name}\n  Push it: {push}"


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
        case {"repository": {"base_commit": commit}}:
            return _commit_or_none(commit)
    return None


def _commit_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and _COMMIT.fullmatch(value) else None


def _json_fields(checkout: Checkout, task: _Task, commit: str | None, changed: Sequence[ChangedFile]) -> dict[str, Any]:
    files = [asdict(file) for file in changed]
    return {
        "task_id": task.id,
        "directory": str(checkout.root),
        "base_commit": task.base,
        "commit": commit,
        "files": files,
    }


def _print_changed_files(task: _Task, changed: Sequence[ChangedFile], options: CliOptions) -> bool:
    """Print the changed files; return whether there are any."""
    if not changed:
        click.echo(f"Task {escape_text(task.id)} changed nothing, so nothing was applied.", err=True)
        return False
    print_changed_files(changed, stdout_console(has_color=options.has_color))
    return True
