"""`sandbox run`"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.assignment import Assignment, assignments
from sandbox.cli.changes import print_changes
from sandbox.cli.checkout import ChangedFile, Checkout
from sandbox.cli.console import talk_console
from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail, watching
from sandbox.cli.figures import counted
from sandbox.cli.flagged import secrets_option
from sandbox.cli.local_work import pack_local_work
from sandbox.cli.manifest_file import ManifestFile
from sandbox.cli.options import Chosen, chosen, common_options
from sandbox.cli.origin import Origin, find_origin
from sandbox.cli.patch import fetch_patch, painted, patch_lines
from sandbox.cli.submission import announce, end, submit_manifest
from sandbox.cli.visible import visible
from sandbox.cli.wrapping import window_cells, wrapped

if TYPE_CHECKING:
    from sandbox.client import Client

NAME_CHARACTERS_MAX = 72
SHOWN_LINES_MAX = 200
"""Of the patch, before it is asked whether to apply it."""


_EXIT_CODES = """\
Exit code: 0 the task completed, 1 it failed, 8 it was cancelled; 4 something here is not pushed, the id is taken, or
the patch does not fit the checkout any more; 5 a secret was found in the patch; 9 the manifest has mistakes."""


@click.command(epilog=_EXIT_CODES)
@click.argument("prompt")
@click.option(
    "--apply/--no-apply",
    "applies",
    default=None,
    help="Apply the patch to this checkout, or leave it; without either a terminal is asked.",
)
@click.option(
    "--include-dirty/--leave-dirty",
    "includes_dirty",
    default=None,
    help="Send what is not committed or pushed along, new files too; or go ahead without it.",
)
@click.option("--remote", metavar="NAME", help="The remote to clone from, instead of the one that the branch follows.")
@click.option("--id", "task_id", metavar="ID", help="The task's id.")
@click.option(
    "--set",
    "settings",
    metavar="PATH=VALUE",
    multiple=True,
    callback=assignments,
    help="Set a field of the manifest, such as vm.network_mode=full; repeat it for more.",
)
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="The checkout, instead of the one that you are in.",
)
@secrets_option
@common_options
def run(
    prompt: str,
    applies: bool | None,
    includes_dirty: bool | None,
    allows_secrets: bool,
    directory: Path,
    **wanted: Any,
) -> None:
    """Have a task done from here and now, and apply what it changed.

    PROMPT says what to do; '-' reads it from stdin. The task clones the remote of the git checkout that you are in, at
    the commit that you have, and begins in the directory that you are in.
    """
    options, checkout = chosen(), Checkout(directory)
    text = sys.stdin.read() if prompt == "-" else prompt
    origin = find_origin(checkout, wanted["remote"])
    if includes_dirty is None:
        _require_pushed(checkout, origin)
    settings: list[Assignment] = wanted["settings"]
    if wanted["task_id"] is not None:
        settings.append(Assignment(("metadata", "id"), wanted["task_id"], f"--id {wanted['task_id']}"))
    _say_origin(origin, checkout, includes_dirty=bool(includes_dirty))
    patch = pack_local_work(checkout, origin.commit) if includes_dirty else b""
    manifest = ManifestFile("sandbox run", json.dumps(_manifest(text, origin, checkout.subpath(), patch)).encode())
    with options.connect() as client:
        answer = submit_manifest(client, manifest, settings)
        task_id = answer["task_id"]
        if options.format != "json":
            announce(answer, is_watched=True)
        with watching(task_id):
            end(client, task_id, options, follows=True)
        _offer(client, task_id, checkout, options, applies=applies, allows_secrets=allows_secrets)


def _require_pushed(checkout: Checkout, origin: Origin) -> None:
    changed = checkout.changed()
    missing = [f"{counted(changed, 'file')} changed and not committed"] if changed else []
    missing += [f"{counted(origin.unpushed, 'commit')} not on {origin.remote}"] if origin.unpushed else []
    if missing:
        message = f"Error: The task would begin without what is only here: {' and '.join(missing)}."
        advice = "  Send it along:       add --include-dirty\n  Go ahead without it: add --leave-dirty"
        fail(f"{visible(message)}\n{advice}", ExitCode.CONFLICT)


def _manifest(prompt: str, origin: Origin, subpath: str, patch: bytes) -> dict[str, Any]:
    first = next((line.strip() for line in prompt.splitlines() if line.strip()), "Task")
    name = "".join(character for character in first if character.isprintable())
    short = name if len(name) <= NAME_CHARACTERS_MAX else name[: NAME_CHARACTERS_MAX - 1].rstrip() + "…"
    repository = {"url": origin.url, "branch": origin.branch, "commit": origin.commit}
    repository |= {"patch": base64.b64encode(patch).decode()} if patch else {}
    return {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": short or "Task"},
        "repository": {**repository, **({"subpath": subpath} if subpath else {})},
        "claude": {"prompt": prompt},
    }


def _say_origin(origin: Origin, checkout: Checkout, *, includes_dirty: bool) -> None:
    lines = [f"From {origin.url}, {origin.branch} at {origin.commit[:12]}."]
    if origin.has_credentials:
        lines.append(f"The credentials in the address of {origin.remote} stay here; the server clones with its own.")
    untracked = 0 if includes_dirty else checkout.changed(untracked=True)
    if untracked:
        lines.append(
            f"{counted(untracked, 'file')} that git does not track {'stays' if untracked == 1 else 'stay'} here."
        )
    for line in lines:
        click.echo("\n".join(wrapped(line, window_cells(sys.stderr), "  ")), err=True)


def _offer(
    client: Client, task_id: str, checkout: Checkout, options: Chosen, *, applies: bool | None, allows_secrets: bool
) -> None:
    """Show what changed, and apply it where that is wanted."""
    changed: list[ChangedFile] = []
    stages = False
    with TemporaryDirectory() as directory:
        patch = Path(directory) / "patch"
        fetch_patch(client, task_id, patch, allows_secrets=allows_secrets)
        is_empty = not patch.stat().st_size
        if not is_empty and applies is None and options.format != "json":
            applies = _ask(patch, options)
        if not is_empty:
            # What else is in the index is the user's own business, and stays apart.
            stages = not checkout.changed()
            changed = checkout.apply(patch, stages=stages) if applies else checkout.list_changes(patch)
    if options.format == "json":
        files = [asdict(file) for file in changed]
        click.echo(
            json.dumps({"type": "patch", "task_id": task_id, "applied": bool(applies and changed), "files": files})
        )
        return
    _tell(changed, options)
    if changed:
        click.echo(_advice(task_id, len(changed), is_applied=bool(applies), is_staged=stages), err=True)


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
        shown = visible(task_id)
        return f"  Look at it: sandbox task diff {shown}\n  Apply it:   sandbox task apply {shown}"
    if is_staged:
        return f"Applied to {counted(files, 'file')} and staged. Look at it with: git diff --cached"
    return f"Applied to {counted(files, 'file')}, beside your own changes. Look at it with: git status"
