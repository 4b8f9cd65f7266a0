"""A manifest on its way to the server, and the task until its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from sandbox.cli.errors import ExitCode, fail, of_final_state
from sandbox.cli.manifest_file import ManifestFile, details, fail_with_mistakes
from sandbox.cli.options import Chosen
from sandbox.cli.output.console import talk_console
from sandbox.cli.output.event_printer import PendingReason, is_interactive, tell
from sandbox.cli.output.json_output import ending, print_json, print_json_lines
from sandbox.cli.output.text import visible
from sandbox.cli.overrides import Assignment, AssignmentError

if TYPE_CHECKING:
    from sandbox.client import Client, DuplicateTaskIdError
    from sandbox.client.responses import Submitted, Task


def submit_manifest(client: Client, manifest: ManifestFile, settings: Sequence[Assignment]) -> Submitted:
    """Ask for a task; ends the command with the manifest's mistakes where it has some."""
    from sandbox import client as api
    from sandbox.model.manifest.errors import InvalidManifestError

    changed = None
    try:
        changed = manifest.change(settings) if settings else None
        sent = changed or manifest
        return client.submit(sent.body, sent.content_type)
    except api.DuplicateTaskIdError as error:
        _refuse_duplicate(error)
    except AssignmentError as error:
        raise click.BadParameter(str(error)) from None
    except InvalidManifestError as error:
        fail_with_mistakes(manifest.name, error.message, details(error.mistakes))
    except api.InvalidManifestError as error:
        found = changed.find_places(error.details) if changed else error.details
        fail_with_mistakes(manifest.name, error.message, found)


def _refuse_duplicate(error: DuplicateTaskIdError) -> NoReturn:
    existing = error.existing_task
    if existing is None:
        raise error
    task_id, state = visible(existing["id"]), visible(existing["state"])
    message = f"Error: Task {task_id} exists already and is {state}.\n  Look at it:      sandbox task status {task_id}"
    fail(f"{message}\n  Take another id: add --id ID", ExitCode.CONFLICT)


def announce(answer: Submitted, *, is_watched: bool) -> None:
    """Print the id on stdout, and for people how to watch the task unless that is done anyway."""
    task_id = visible(answer["task_id"])
    click.echo(task_id)
    sys.stdout.flush()
    if sys.stderr.isatty() and not is_watched:
        click.echo(
            f"Submitted; it is {visible(answer['state'])}.\n  Watch it: sandbox task status {task_id} --watch",
            err=True,
        )


def end(client: Client, task_id: str, options: Chosen, *, follows: bool) -> Task:
    """Wait for the task's end, `follows` telling what happens; ends the command unless it completed."""
    if follows:
        events = client.events(task_id)
        if options.format == "json":
            print_json_lines(events)
        else:
            console, reason = talk_console(has_color=options.has_color), PendingReason(options, task_id)
            is_believed = not is_interactive(client.status(task_id))
            tell(events, console, is_believed=is_believed, why_pending=reason)
    status = client.wait(task_id)
    if options.format == "json" and not follows:
        print_json(status)
    code = of_final_state(status["state"])
    if code is not ExitCode.DONE:
        fail(ending(status, has_reason=not follows), code)
    if options.format != "json":
        click.echo(ending(status), err=True)
    return status
