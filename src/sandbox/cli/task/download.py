"""`sandbox task download`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.answer import print_json
from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail
from sandbox.cli.figures import size
from sandbox.cli.options import chosen, common_options
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from sandbox.client import Client


@click.command(epilog="Every file is checked against its SHA-256 and appears whole or not at all.")
@click.argument("task_id", metavar="TASK_ID")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--all", "takes_all", is_flag=True, help="All artifacts, into a directory named after the task.")
@click.option("--output", "-o", metavar="PATH", help="The file or directory to write to; '-' for stdout.")
@common_options
def download(task_id: str, name: str | None, takes_all: bool, output: str | None) -> None:
    """Download artifacts, verified.

    NAME is one artifact's name, or its path in the workspace.
    """
    if takes_all == (name is not None):
        raise click.UsageError("Give the NAME of one artifact, or --all.")
    if takes_all and output == "-":
        raise click.UsageError("Only one artifact fits on stdout; give its NAME.")
    options = chosen()
    with options.connect() as client:
        if output == "-":
            _print(client, task_id, str(name))
            return
        saved = _all(client, task_id, output) if name is None else [_one(client, task_id, name, output)]
    if options.format == "json":
        print_json({"task_id": task_id, "files": saved})


def _one(client: Client, task_id: str, name: str, output: str | None) -> dict[str, Any]:
    target = Path(output) if output else Path(_file_name(name))
    return _save(client, task_id, name, target / _file_name(name) if target.is_dir() else target)


def _all(client: Client, task_id: str, output: str | None) -> list[dict[str, Any]]:
    # A directory of their own by default: their names were chosen by the agent, and `.envrc` is a name.
    directory = Path(output or _file_name(task_id))
    listed = client.artifacts(task_id)["artifacts"]
    directory.mkdir(parents=True, exist_ok=True)
    return [_save(client, task_id, entry["name"], directory / _file_name(entry["name"])) for entry in listed]


def _save(client: Client, task_id: str, name: str, target: Path) -> dict[str, Any]:
    size_bytes = client.download(task_id, name, target)
    click.echo(f"{visible(str(target))}  {size(size_bytes)}", err=True)
    return {"name": name, "file": str(target), "size_bytes": size_bytes}


def _print(client: Client, task_id: str, name: str) -> None:
    with TemporaryDirectory() as directory:
        target = Path(directory) / "artifact"
        client.download(task_id, name, target)
        if sys.stdout.isatty():
            for line in target.read_text(errors="replace").splitlines():
                click.echo(visible(line))
            return
        with target.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


def _file_name(name: str) -> str:
    last = name.rpartition("/")[2]
    if last in {"", ".", ".."} or "\x00" in last:
        fail(f"Error: {visible(repr(name))} cannot be the name of a file; choose one with --output.", ExitCode.USAGE)
    return last
