"""`sandbox run`"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import click

from sandbox.cli.checkout.apply_prompt import Offer
from sandbox.cli.checkout.origin import Origin, find_origin, pack_local_work
from sandbox.cli.checkout.worktree import Checkout
from sandbox.cli.errors import ExitCode, fail, watching
from sandbox.cli.manifest_file import ManifestFile
from sandbox.cli.options import chosen, common_options
from sandbox.cli.output.formatting import counted
from sandbox.cli.output.text import visible, window_cells, wrapped
from sandbox.cli.overrides import Assignment, assignments
from sandbox.cli.secret_guard import secrets_option
from sandbox.cli.submission import announce, end, submit_manifest
from sandbox.model.printable import printable

NAME_CHARACTERS_MAX = 72


_EXIT_CODES = """\
Exit code: 0 the task completed (it may have changed nothing), 1 it failed, 8 it was cancelled; 4 something here is not
pushed, the id is taken, the patch does not fit or has remarks only, or something else is checked out by then; 5 a
secret was found in the patch; 9 the manifest has mistakes."""


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
    from sandbox.model.manifest.document import write_json

    options, checkout = chosen(), Checkout(directory)
    text = _read_prompt(prompt)
    origin = find_origin(checkout, wanted["remote"])
    if includes_dirty is None:
        _require_pushed(checkout, origin)
    settings: list[Assignment] = wanted["settings"]
    if wanted["task_id"] is not None:
        settings.append(Assignment(("metadata", "id"), wanted["task_id"], f"--id {wanted['task_id']}"))
    _say_origin(origin, checkout, includes_dirty=bool(includes_dirty))
    is_beside = bool(includes_dirty) and bool(checkout.changed() or checkout.changed(untracked=True))
    offer = Offer(checkout, options, applies, allows_secrets, is_beside, checkout.place())
    patch = pack_local_work(checkout, origin.commit) if includes_dirty else b""
    manifest = ManifestFile("sandbox run", write_json(_manifest(text, origin, checkout.subpath(), patch)))
    with options.connect() as client:
        answer = submit_manifest(client, manifest, settings)
        task_id = answer["task_id"]
        if options.format != "json":
            announce(answer, is_watched=True)
        with watching(task_id):
            end(client, task_id, options, follows=True)
        offer.make(client, task_id)


def _read_prompt(prompt: str) -> str:
    told = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    try:
        return told.decode()
    except UnicodeDecodeError:
        raise click.UsageError("The prompt must be UTF-8.") from None


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
    name = printable(first, lambda _: "")
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
