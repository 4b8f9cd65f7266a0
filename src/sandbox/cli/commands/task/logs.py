"""The `sandbox task logs` command."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import hint_if_interrupted
from sandbox.cli.options import current_options, output_options, parse_past_time_option, server_options
from sandbox.cli.output.console import escape_text, print_json_lines, stdout_console
from sandbox.cli.output.event_printer import FULL, PendingReasonPoller, print_events
from sandbox.cli.output.text_log_parser import LogLine, mark_parsed_lines, parse_line, parse_log_events
from sandbox.cli.task_arguments import task_argument
from sandbox.model.wire.event_bodies import CONVERSATION_TYPES

if TYPE_CHECKING:
    from sandbox.client import Client

_TAGS = {"stdout": b"[STDOUT] ", "stderr": b"[STDERR] "}


@command(
    epilog=help_examples(
        "sandbox task logs 5e173eb5 --follow",
        "sandbox task logs 5e173eb5 --stream events --since 10m",
        "sandbox task logs 5e173eb5 --pretty | less",
    )
)
@task_argument
@click.option("--follow", "-f", "follows", is_flag=True, help="Also print new output and events until the task ends.")
@click.option(
    "--tail", type=click.IntRange(min=0), metavar="LINES", help="Only this many of the last lines; 0 for all."
)
@click.option(
    "--stream",
    type=click.Choice(["all", "stdout", "stderr", "events", "conversation"]),
    default="all",
    help="Only this stream [default: all]",
)
@click.option(
    "--since",
    callback=parse_past_time_option,
    metavar="TIME",
    help="Only lines since this time, such as 2026-01-29T10:10:15Z, or 10m for the last 10 minutes.",
)
@click.option("--timestamps", "has_times", is_flag=True, help="Prefix each line with its time; implies --raw.")
@click.option(
    "--pretty/--raw",
    "is_pretty",
    default=None,
    help="Print human-readable output, or unformatted lines [default: --pretty on a terminal].",
)
@server_options
@output_options("text", "json", short=False)
def logs(task_id: str, follows: bool, has_times: bool, is_pretty: bool | None, **filters: Any) -> None:
    """Print a task's output and events.

    On a terminal, the agent's messages, tool calls and edits are formatted. If the output is piped, the lines are
    printed as the agent wrote them, mostly as JSON; use --pretty for readable text. Lines that are not formatted are
    prefixed with the name of their stream, except with --stream stdout or stderr. With --format json, each line is one
    event; events of type output have the field seq only with --follow.
    """
    options, stream = current_options(), filters["stream"]
    if is_pretty and (has_times or options.format == "json"):
        raise click.UsageError(f"--pretty cannot be combined with {'--timestamps' if has_times else '--format json'}.")
    formats = sys.stdout.isatty() and not has_times if is_pretty is None else is_pretty
    with options.connect() as client, hint_if_interrupted(task_id):
        if options.format == "json":
            print_json_lines(_events(client, task_id, is_following=follows, **filters))
        elif formats:
            events = _formatted_events(client, task_id, is_following=follows, **filters)
            console, reason = stdout_console(has_color=options.has_color), PendingReasonPoller(options, task_id)
            print_events(events, console, FULL, is_live=follows, pending_reason=reason)
        else:
            lines = (
                _follow_lines(client, task_id, **filters)
                if follows
                else map(parse_line, client.logs(task_id, **filters))
            )
            _print_lines(lines, has_times=has_times, has_tags=stream not in _TAGS)


def _events(client: Client, task_id: str, *, is_following: bool, **filters: Any) -> Iterator[Mapping[str, Any]]:
    return (
        client.events(task_id, **filters)
        if is_following
        else parse_log_events(client.logs(task_id, **filters), task_id)
    )


def _formatted_events(
    client: Client, task_id: str, *, stream: str, is_following: bool, **filters: Any
) -> Iterator[Mapping[str, Any]]:
    """Yield the events to format. `stdout` and `conversation` yield the same events, including ends of tool calls."""
    is_conversation = stream in {"stdout", "conversation"}
    requested = "all" if is_conversation else stream
    events = _events(client, task_id, stream=requested, is_following=is_following, **filters)
    for event in events if is_following else mark_parsed_lines(events):
        if not is_conversation or (event["type"] in _FORMATTED_TYPES and event.get("stream") != "stderr"):
            yield event


_FORMATTED_TYPES = CONVERSATION_TYPES | {"output", "tool_call", "gap", "end"}


def _print_lines(lines: Iterable[LogLine], *, has_times: bool, has_tags: bool) -> None:
    for time, tag, content, is_continued in lines:
        line = (time if has_times else b"") + (tag if has_tags else b"") + content
        if sys.stdout.isatty():
            click.echo(escape_text(line.decode(errors="replace").removesuffix("\n")), nl=not is_continued)
            continue
        is_bare = not has_times and not has_tags
        sys.stdout.buffer.write(line if is_bare or is_continued or line.endswith(b"\n") else line + b"\n")
        sys.stdout.buffer.flush()


def _follow_lines(client: Client, task_id: str, **filters: Any) -> Iterator[LogLine]:
    unfinished = b""
    for event in client.events(task_id, **filters):
        if event["type"] == "end":
            continue
        line = _event_line(event)
        if unfinished and line.stream != unfinished:
            yield LogLine(b"", b"", b"\n")
        yield line._replace(time=b"", stream=b"") if line.stream == unfinished else line
        unfinished = line.stream if line.is_continued else b""


def _event_line(event: Mapping[str, Any]) -> LogLine:
    import json

    time = f"[{event.get('timestamp')}] ".encode()
    if event["type"] == "output":
        tag, text = _TAGS.get(str(event.get("stream")), b"[EVENT] "), str(event.get("data", ""))
        return LogLine(time, tag, text.encode(errors="replace"), is_continued=bool(event.get("continued")))
    encoded = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return LogLine(time, b"[EVENT] ", encoded + b"\n")
