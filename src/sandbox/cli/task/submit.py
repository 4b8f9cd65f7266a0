"""`sandbox task submit`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, BinaryIO

import click

from sandbox.cli.answer import ending, print_json, print_json_lines
from sandbox.cli.assignment import Assignment, AssignmentError, assignments
from sandbox.cli.console import talk_console
from sandbox.cli.exit_code import ExitCode, of_final_state
from sandbox.cli.failures import fail, watching
from sandbox.cli.manifest_file import ManifestFile
from sandbox.cli.mistakes import details, fail_with_mistakes
from sandbox.cli.options import Chosen, chosen, common_options
from sandbox.cli.pending import PendingReason
from sandbox.cli.story import tell
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.answers import Submitted


@click.command(epilog="Prints the task's id alone on stdout, so that ID=$(sandbox task submit task.yaml) works.")
@click.argument("file", type=click.File("rb"))
@click.option("--wait", "-w", "waits", is_flag=True, help="Wait for the end; the exit code tells how it went.")
@click.option("--follow", "follows", is_flag=True, help="Show what happens until the end; waits as well.")
@click.option("--id", "task_id", metavar="ID", help="The task's id, instead of the manifest's.")
@click.option(
    "--set",
    "settings",
    metavar="PATH=VALUE",
    multiple=True,
    callback=assignments,
    help="Set a field of the manifest, such as vm.cpus=16 or secrets[0].key=TOKEN; repeat it for more.",
)
@common_options
def submit(file: BinaryIO, waits: bool, follows: bool, task_id: str | None, settings: list[Assignment]) -> None:
    """Submit a manifest as a task.

    FILE is YAML or JSON; '-' stands for stdin.
    """
    options, manifest = chosen(), ManifestFile(file)
    if task_id is not None:
        settings.append(Assignment(("metadata", "id"), task_id, f"--id {task_id}"))
    with options.connect() as client:
        answer = _submit(client, manifest, settings)
        if options.format == "json":
            print_json(answer) if not (waits or follows) else None
        else:
            _announce(answer, is_watched=waits or follows)
        if waits or follows:
            with watching(answer["task_id"]):
                _finish(client, answer["task_id"], options, follows=follows)


def _submit(client: Client, manifest: ManifestFile, settings: list[Assignment]) -> Submitted:
    from sandbox import client as api
    from sandbox.model.mistake import InvalidManifestError

    changed = None
    try:
        changed = manifest.change(settings) if settings else None
        sent = changed or manifest
        return client.submit(sent.body, sent.content_type)
    except AssignmentError as error:
        raise click.BadParameter(str(error)) from None
    except InvalidManifestError as error:
        fail_with_mistakes(manifest.name, error.message, details(error.mistakes))
    except api.InvalidManifestError as error:
        found = changed.find_places(error.details) if changed else error.details
        fail_with_mistakes(manifest.name, error.message, found)


def _announce(answer: Submitted, *, is_watched: bool) -> None:
    task_id = visible(answer["task_id"])
    click.echo(task_id)
    sys.stdout.flush()
    if sys.stderr.isatty() and not is_watched:
        click.echo(
            f"Submitted; it is {visible(answer['state'])}.\n  Watch it: sandbox task status {task_id} --watch",
            err=True,
        )


def _finish(client: Client, task_id: str, options: Chosen, *, follows: bool) -> None:
    if follows:
        frames = client.events(task_id)
        if options.format == "json":
            print_json_lines(frames)
        else:
            console = talk_console(has_color=options.has_color)
            tell(frames, console, why_pending=PendingReason(options, task_id))
    status = client.wait(task_id)
    if options.format == "json" and not follows:
        print_json(status)
    code = of_final_state(status["state"])
    if code is not ExitCode.DONE:
        fail(ending(status, has_reason=not follows), code)
    if options.format != "json":
        # On a line of its own a command can be copied, also in a narrow window.
        shown = visible(task_id)
        click.echo(f"{ending(status)}\n  What it changed: sandbox task diff {shown}", err=True)
        click.echo(f"  What it made:    sandbox task artifacts {shown}", err=True)
