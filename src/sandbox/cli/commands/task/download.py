"""The `sandbox task download` command."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import allow_secrets_option, common_options, current_options
from sandbox.cli.output.console import escape_name, escape_text, print_json
from sandbox.cli.patches import patch_lines, reject_secrets
from sandbox.cli.task_arguments import task_argument
from sandbox.model.artifacts import generated_artifact_names
from sandbox.model.display_text import format_size
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Artifact


@command(
    epilog=help_examples(
        "sandbox task download 5e173eb5 report.md",
        "sandbox task download 5e173eb5 --all --output results",
        note="Every file is verified against its SHA-256 checksum and written atomically.",
    )
)
@task_argument
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "--all", "downloads_all", is_flag=True, help="Download all artifacts to a directory named after the task."
)
@click.option("--output", "-o", metavar="PATH", help="The file or directory to write to; '-' for stdout.")
@click.option("--verify", "verifies", is_flag=True, help="Read every file back from disk and print its SHA-256.")
@allow_secrets_option
@common_options
def download(
    task_id: str, name: str | None, downloads_all: bool, output: str | None, verifies: bool, allows_secrets: bool
) -> None:
    """Download artifacts and verify their checksums.

    NAME is the name of one artifact, or its path in the workspace.
    """
    if downloads_all == (name is not None):
        raise click.UsageError("Give the NAME of one artifact, or --all.")
    if output == "-" and (downloads_all or verifies):
        raise click.UsageError("To write to stdout, give the NAME of one artifact and omit --verify.")
    options = current_options()
    with options.connect() as client:
        requested = _select_artifacts(client, task_id, name)
        selected = [entry for entry in requested if allows_secrets or not entry["contains_secret"]]
        if name is not None:
            reject_secrets(requested, allows_secrets=allows_secrets)
        if output == "-":
            _print_artifact(client, task_id, selected[0]["name"])
            return
        targets = _targets(task_id, name, selected, output)
        if missing := next((target.parent for _, target in targets if not target.parent.is_dir()), None):
            raise click.UsageError(f"There is no directory {escape_name(str(missing))}; create it, or choose another.")
        if verifies and any(target.exists() and not target.is_file() for _, target in targets):
            raise click.UsageError("--verify needs a file; omit it, or choose a file with --output.")
        saved = [_save(client, task_id, entry, target, verifies=verifies) for entry, target in targets]
    if options.format == "json":
        print_json({"task_id": task_id, "files": saved})
    reject_secrets(requested, allows_secrets=allows_secrets)


def _select_artifacts(client: Client, task_id: str, name: str | None) -> list[Artifact]:
    """Return the requested artifacts: all, or the one with this name or (if no name matches) with this path."""
    listed = client.artifacts(task_id)["artifacts"]
    if name is None:
        return listed or _list_again(client, task_id)
    by_name, by_path = ([entry for entry in listed if entry[field] == name] for field in ("name", "path"))
    # The agent chose the paths, so a path must not select a file under the name of a generated artifact.
    matches = by_name or (by_path if name not in generated_artifact_names(task_id) else [])
    if not matches:
        message = f"Error: Task {escape_text(task_id)} has no artifact {escape_name(repr(name))}."
        fail(f"{message}\n  List them: sandbox task artifacts {escape_text(task_id)}", ExitCode.NOT_FOUND)
    return matches[:1]


def _list_again(client: Client, task_id: str) -> list[Artifact]:
    """List the artifacts again after the task has ended; exit with an error if there are still none."""
    has_ended = client.status(task_id)["state"] in FINAL_STATES
    if has_ended and (listed := client.artifacts(task_id)["artifacts"]):
        return listed
    escaped_id = escape_text(task_id)
    message = (
        f"artifacts yet; they are collected when the agent has ended.\n  Wait for them: sandbox task wait {escaped_id}"
    )
    if has_ended:
        message = f"artifacts: it ended without any.\n  See why: sandbox task status {escaped_id}"
    return fail(f"Error: Task {escaped_id} has no {message}", ExitCode.NOT_FOUND)


def _targets(
    task_id: str, name: str | None, entries: list[Artifact], output: str | None
) -> list[tuple[Artifact, Path]]:
    if name is None:
        # Use a separate directory by default: the agent chose the files' names, and one of them may be `.envrc`.
        directory = Path(output or _file_name(task_id))
        targets = [(entry, directory / _file_name(entry["name"])) for entry in entries]
        _reject_links([*([] if output else [directory]), *(target for _, target in targets)])
        directory.mkdir(parents=True, exist_ok=True)
        return targets
    own_name = _file_name(name)  # as given by the user: an artifact that is found by its path may have any name
    target, is_named = Path(output or own_name), output is not None
    if target.is_dir():
        _reject_links([] if is_named else [target])
        target, is_named = target / own_name, False
    _reject_links([] if is_named else [target])
    return [(entries[0], target)]


def _reject_links(targets: Iterable[Path]) -> None:
    """Exit with an error if a target is a symbolic link. It may come from an applied patch and lead to a device."""
    for target in targets:
        if target.is_symlink():
            name = escape_name(str(target))
            raise click.UsageError(f"{name} is a symbolic link; remove it, or choose another target with --output.")


def _save(client: Client, task_id: str, entry: Artifact, target: Path, *, verifies: bool) -> dict[str, Any]:
    size_bytes = client.download(task_id, entry["name"], target)
    checksum = entry["checksum"]
    if verifies:
        _verify(target, checksum)
    suffix = f"  {escape_text(checksum)}" if verifies else ""
    click.echo(f"{escape_name(str(target))}  {format_size(size_bytes)}{suffix}", err=True)
    return {"name": entry["name"], "file": str(target), "size_bytes": size_bytes, "checksum": checksum}


def _verify(target: Path, checksum: str) -> None:
    with target.open("rb") as file:
        matches = hashlib.file_digest(file, "sha256").hexdigest()
    if f"sha256:{matches}" != checksum:
        fail(f"Error: {escape_name(str(target))} is damaged: it has the SHA-256 {matches}.", ExitCode.SERVER_ERROR)


def _print_artifact(client: Client, task_id: str, name: str) -> None:
    with TemporaryDirectory() as directory:
        target = Path(directory) / "artifact"
        client.download(task_id, name, target)
        if sys.stdout.isatty():
            for line in patch_lines(target):
                click.echo(escape_text(line))
            return
        with target.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


def _file_name(name: str) -> str:
    last = name.rpartition("/")[2]
    if last in {"", ".", ".."} or "\x00" in last:
        fail(
            f"Error: {escape_name(repr(name))} cannot be the name of a file; choose one with --output.", ExitCode.USAGE
        )
    return last
