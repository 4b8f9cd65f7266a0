"""Reads a manifest from files, options and overrides, and submits it."""

from __future__ import annotations

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

import click

from sandbox.cli.errors import (
    ExitCode,
    exit_code_for_client_error,
    exit_code_for_state,
    fail,
    hint_if_interrupted,
    hint_if_output_fails,
)
from sandbox.cli.options import CliOptions
from sandbox.cli.output.console import escape_text, print_json, print_json_lines, stderr_console, terminal_width
from sandbox.cli.output.event_printer import PendingReasonPoller, print_events
from sandbox.cli.output.formatting import changes_summary, pluralize, state_text
from sandbox.cli.output.task_outcome import (
    allow_command,
    find_denied_connections,
    next_commands,
    outcome_summary,
    task_id_for_hint,
)
from sandbox.cli.patches import chain_changes_summary
from sandbox.model.manifest import overrides as model
from sandbox.model.manifest.overrides import Override, OverrideError

if TYPE_CHECKING:
    from sandbox.client import Client, DuplicateTaskIdError
    from sandbox.client.response_types import Submitted, Task
    from sandbox.model.errors import FieldError
    from sandbox.model.manifest.parsed_document import Document
    from sandbox.model.manifest.schema import Manifest


class OverriddenManifest:
    """A manifest with overrides applied: the body to send, and the locations of its fields in the original file."""

    content_type = "application/json"

    def __init__(self, document: Document, overrides: Sequence[Override]) -> None:
        from sandbox.model.errors import field_name
        from sandbox.model.manifest.parsed_document import write_json

        self.body = write_json(document.data)
        self._overridden = {field_name(override.path): override.origin for override in overrides}
        marks = {**document.value_locations, **document.key_locations}
        self._locations = {field_name(path): (location.line, location.column) for path, location in marks.items()}

    def locate_errors(self, field_errors: object) -> list[dict[str, Any]]:
        """Add to each of the API's `details` the line in the file, or the option that set the field."""
        listed: Iterable[Any] = field_errors if isinstance(field_errors, list) else ()
        return [self._locate(dict(field_error)) for field_error in listed if isinstance(field_error, Mapping)]

    def _locate(self, field_error: dict[str, Any]) -> dict[str, Any]:
        field = str(field_error.get("field"))
        if field in self._overridden:
            return {**field_error, "source": self._overridden[field]}
        line, column = self._locations.get(field, (None, None))
        return {**field_error, "line": line, "column": column}


def parse_overrides(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Override]:
    """Parse the option's values; called by click."""
    return [parse_override(value) for value in values]


def id_override(task_id: str) -> Override:
    """Return the override that is equivalent to `--id`."""
    quoted = task_id.replace("'", "''")
    return Override(("metadata", "id"), task_id, f"--id {task_id}", f"metadata.id='{quoted}'")


def parse_override(text: str) -> Override:
    """Parse the value of `--set`. Raises click.BadParameter."""
    try:
        return model.parse_override(text, f"--set {text}")
    except OverrideError as error:
        raise click.BadParameter(str(error)) from None


class ManifestFile:
    """A manifest's bytes and format. name: for error messages."""

    def __init__(self, name: str, body: bytes) -> None:
        self.name = name
        self.body = body
        self.is_json = self.name.endswith(".json") or _is_json(self.body)

    @classmethod
    def read(cls, file: BinaryIO) -> Self:
        """Read the file argument of a command."""
        from sandbox.model.fixed_limits import BODY_BYTES_MAX

        is_stdin = file.name in {"<stdin>", "-", 0}  # 0: stdin was closed
        name = "<stdin>" if is_stdin else str(file.name)
        # read one byte beyond the limit to detect a manifest that is too large
        return cls(name, file.read(BODY_BYTES_MAX + 1))

    @property
    def content_type(self) -> str:
        """The media type of the manifest."""
        return "application/json" if self.is_json else "application/yaml"

    def parse(self) -> Manifest:
        """Parse and validate the manifest as the server does, except for the server's profiles.

        Raises the model's InvalidManifestError.
        """
        from sandbox.agents import registered_agents
        from sandbox.model.manifest.parser import parse_manifest

        return parse_manifest(self.body, agents=registered_agents(), is_json=self.is_json, problem_by_profile=None)

    def with_overrides(self, overrides: Sequence[Override]) -> OverriddenManifest:
        """Apply overrides. Raises the model's InvalidManifestError if the manifest cannot be parsed."""
        from sandbox.agents import registered_agents
        from sandbox.model.errors import InvalidManifestError
        from sandbox.model.manifest.parser import read_document

        document = read_document(self.body, agents=registered_agents(), is_json=self.is_json)
        if document.errors:
            raise InvalidManifestError(document.errors)
        for override in overrides:
            override.apply(document.data)
        return OverriddenManifest(document, overrides)


def _is_json(body: bytes) -> bool:
    if not body.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
        return False
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def field_error_lines(file_name: str, field_errors: object) -> list[str]:
    """Format each of the API's `details`: `task.yaml:12:3: vm.memory: must be …`."""
    listed: Iterable[Any] = field_errors if isinstance(field_errors, list) else ()
    return [_field_error_line(file_name, field_error) for field_error in listed if isinstance(field_error, Mapping)]


def fail_with_field_errors(file_name: str, message: str, field_errors: object) -> NoReturn:
    """Print the errors of a manifest and exit. A single error of an option is one line."""
    lines = field_error_lines(file_name, field_errors)
    if len(lines) == 1 and lines[0].startswith(_OPTION_PREFIX):
        fail(f"Error: {lines[0]}", ExitCode.INVALID_MANIFEST)
    summary = f"{escape_text(file_name)} has {pluralize(len(lines), 'error')}." if lines else escape_text(message)
    fail("\n".join([*lines, f"Error: {summary}"]), ExitCode.INVALID_MANIFEST)


def field_error_details(field_errors: Iterable[FieldError]) -> list[dict[str, Any]]:
    """Convert the model's errors to the form of the API's `details`."""
    import msgspec

    return [msgspec.to_builtins(field_error) for field_error in field_errors]


_OPTION_PREFIX = "--set "


def _field_error_line(file_name: str, field_error: Mapping[str, Any]) -> str:
    source = str(field_error.get("source") or file_name)
    if source.startswith(f"{_OPTION_PREFIX}{field_error.get('field')}="):
        message = str(field_error.get("message", "")).removeprefix("is an ")  # the option contains the field
        return escape_text(f"{source}: {message}")
    if field_error.get("line") is not None:
        source += f":{field_error['line']}:{field_error.get('column') or 1}"
    field = f"{field_error['field']}: " if field_error.get("field") else ""
    return escape_text(f"{source}: {field}{field_error.get('message', '')}")


def read_prompt(prompt: str) -> str:
    """Return the prompt from the command line; `-` reads it from stdin. Exits with an error if it is not UTF-8."""
    data = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise click.UsageError("The prompt must be UTF-8.") from None


def submit_manifest(client: Client, manifest: ManifestFile, overrides: Sequence[Override]) -> Submitted:
    """Submit a task. If the manifest is invalid, prints its errors and exits."""
    from sandbox import client as api
    from sandbox.model.errors import InvalidManifestError

    changed = None
    try:
        changed = manifest.with_overrides(overrides) if overrides else None
        sent = changed or manifest
        return client.submit(sent.body, sent.content_type)
    except api.DuplicateTaskIdError as error:
        _fail_duplicate(error)
    except OverrideError as error:
        raise click.BadParameter(str(error)) from None
    except InvalidManifestError as error:
        fail_with_field_errors(manifest.name, error.message, field_error_details(error.errors))
    except api.InvalidManifestError as error:
        field_errors = changed.locate_errors(error.details) if changed else error.details
        fail_with_field_errors(manifest.name, error.message, field_errors)


def submit_derived_task(submit: Callable[[], Submitted], task_id: str, overrides: Sequence[Override] = ()) -> Submitted:
    """Submit a task created from an earlier one. If the new manifest is invalid, prints its errors and exits."""
    from sandbox import client as api
    from sandbox.model.errors import field_name

    try:
        return submit()
    except api.DuplicateTaskIdError as error:
        _fail_duplicate(error)
    except api.TaskNotContinuableError as error:
        request, command = f" with POST /api/v1/tasks/{task_id}/rerun.", f" with: sandbox task rerun {task_id}"
        fail(f"Error: {escape_text(error.message.replace(request, command))}", exit_code_for_client_error(error))
    except api.InvalidManifestError as error:
        origins = {field_name(override.path): override.origin for override in overrides}
        details: Iterable[Any] = error.details if isinstance(error.details, list) else ()
        located = [_with_origin(each, origins.get(str(each.get("field")))) for each in details]
        fail_with_field_errors(f"The manifest of task {task_id}", error.message, located)


def _with_origin(detail: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    """Extend a field's error with the option that set the field. If a list is expected, add how to set an entry."""
    message = str(detail.get("message", ""))
    if origin is not None and message.startswith("must be a list"):
        message += f"; set an entry with --set {detail.get('field')}[0]=VALUE"
    return {**detail, "message": message, "source": origin}


def _fail_duplicate(error: DuplicateTaskIdError) -> NoReturn:
    existing = error.existing_task
    if existing is None:
        raise error
    task_id, state = escape_text(existing["id"]), escape_text(state_text(existing, on_terminal=sys.stderr.isatty()))
    message = f"Error: Task {task_id} already exists and is {state}.\n  Show it:        sandbox task status {task_id}"
    fail(f"{message}\n  Use another id: add --id ID", ExitCode.CONFLICT)


def print_submitted(submitted: Submitted, server: str, *, is_watched: bool) -> None:
    """Print the id on stdout. On a terminal, also print the page's address, and a watch command unless `is_watched`."""
    from sandbox.client.requests import task_page_url

    task_id = escape_text(submitted["task_id"])
    click.echo(task_id)
    sys.stdout.flush()
    if sys.stderr.isatty():
        hints = [f"  Dashboard: {escape_text(task_page_url(server, submitted['task_id']))}"]
        if not is_watched:
            state = escape_text(submitted["state"])
            watch = f"sandbox task status {task_id_for_hint(submitted['task_id'])} --watch"
            hints = [f"Submitted; it is {state}.", f"  Watch it:  {watch}", *hints]
        click.echo("\n".join(hints), err=True)


def wait_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the --wait (`waits`) and --follow (`follows`) options to a command that submits a task."""
    wait = click.option(
        "--wait",
        "-w",
        "waits",
        is_flag=True,
        help="Wait until the task ends. Exit code: 0 if completed, 1 if failed, 8 if cancelled.",
    )
    follow_help = "Show events until the task ends; implies --wait."
    return wait(click.option("--follow", "follows", is_flag=True, help=follow_help)(command))


def print_submitted_and_wait(
    client: Client, submitted: Submitted, options: CliOptions, *, waits: bool, follows: bool
) -> None:
    """Print the new task, and wait until it has ended if an option of `wait_options` is set."""
    task_id = escape_text(submitted["task_id"])
    with hint_if_output_fails(f"Task {task_id} was submitted. Show it: sandbox task status {task_id}"):
        if options.format == "json":
            print_json(submitted) if not (waits or follows) else None
        else:
            print_submitted(submitted, options.server, is_watched=waits or follows)
    if waits or follows:
        with hint_if_interrupted(submitted["task_id"]):
            status = wait_for_end(client, submitted["task_id"], options, should_follow=follows)
            _hint(client, status, options)


def _hint(client: Client, status: Task, options: CliOptions) -> None:
    if options.format != "json":
        chain_changes = chain_changes_summary(client, status)
        size = changes_summary(status, chain_changes)
        rows = [("Changes", size)] if size else []
        # Print one line per command, so that it can be copied even from a narrow window.
        rows += next_commands(status, on_terminal=sys.stderr.isatty(), has_chain_changes=bool(chain_changes))
        rows.append(("Artifacts", f"sandbox task artifacts {task_id_for_hint(status['id'])}"))
        click.echo("\n".join(f"  {label + ':':<10} {value}" for label, value in rows), err=True)


def wait_for_end(
    client: Client, task_id: str, options: CliOptions, *, should_follow: bool, omits_denied_connections: bool = False
) -> Task:
    """Wait for the task to end, printing events if `should_follow`. Exits with an error unless the task completed.

    omits_denied_connections: if the task completed, the caller prints the connections that were refused.
    """
    if should_follow:
        events = client.events(task_id)
        if options.format == "json":
            print_json_lines(events)
        else:
            console, reason = stderr_console(has_color=options.has_color), PendingReasonPoller(options, task_id)
            print_events(events, console, pending_reason=reason, omits_failure=True)
    status = client.wait(task_id)
    if options.format == "json" and not should_follow:
        print_json(status)
    code = exit_code_for_state(status["state"])
    if should_follow and options.format != "json" and not (omits_denied_connections and code is ExitCode.SUCCESS):
        _print_allow_command(client, status)
    if code is not ExitCode.SUCCESS:
        on_terminal = terminal_width(sys.stderr) is not None
        fail(outcome_summary(status, ends_with_outcome=should_follow, on_terminal=on_terminal), code)
    if options.format != "json":
        click.echo(outcome_summary(status), err=True)
    return status


def _print_allow_command(client: Client, status: Task) -> None:
    """Print the command that allows the hosts that were refused while the task ran, if there are any."""
    _, denied = find_denied_connections(client, status)
    if command := allow_command(status, denied, on_terminal=terminal_width(sys.stderr) is not None):
        hosts = pluralize(len({each.host for each in denied}), "host")
        click.echo(f"  {hosts} refused. Allow in a new run:\n  {command}", err=True)
