"""`sandbox task logs`"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.errors import watching
from sandbox.cli.options import chosen, output_options, past_time, server_options, task_argument
from sandbox.cli.output.console import output_console
from sandbox.cli.output.event_printer import FULL, STDOUT, PendingReason, is_interactive, tell
from sandbox.cli.output.json_output import print_json_lines
from sandbox.cli.output.text import visible
from sandbox.cli.output.transcript import Line, frames_of, split

if TYPE_CHECKING:
    from sandbox.client import Client

_TAGS = {"stdout": b"[STDOUT] ", "stderr": b"[STDERR] "}


@click.command()
@task_argument
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the task's end.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines; 0 for all.")
@click.option(
    "--stream",
    type=click.Choice(["all", "stdout", "stderr", "events"]),
    default="all",
    help="Only this one [default: all]",
)
@click.option("--since", callback=past_time, metavar="TIME", help="Only what came since: 2026-01-29T10:10:15Z, or 10m.")
@click.option("--timestamps", "has_times", is_flag=True, help="Put the time before each line; raw.")
@click.option("--raw", "is_raw", is_flag=True, help="The lines as they came, also on a terminal.")
@server_options
@output_options("text", "json", short=False)
def logs(task_id: str, follows: bool, has_times: bool, is_raw: bool, **wanted: Any) -> None:
    """Print a task's output and events.

    On a terminal for people: what the agent says and does. Elsewhere as lines with the stream that they belong to;
    with --stream stdout or stderr they are bare. With --format json one event a line; output has its seq with --follow.
    """
    options, stream = chosen(), wanted["stream"]
    with options.connect() as client, watching(task_id):
        if options.format == "json":
            print_json_lines(_frames(client, task_id, follows=follows, **wanted))
        elif sys.stdout.isatty() and not is_raw and not has_times:
            frames = _frames(client, task_id, follows=follows, **wanted)
            detail = STDOUT if stream == "stdout" else FULL
            console, reason = output_console(has_color=options.has_color), PendingReason(options, task_id)
            is_believed = not is_interactive(client.status(task_id))
            tell(frames, console, detail, is_live=follows, is_believed=is_believed, why_pending=reason)
        else:
            lines = _followed(client, task_id, **wanted) if follows else map(split, client.logs(task_id, **wanted))
            _print(lines, has_times=has_times, has_tags=stream not in _TAGS)


def _frames(client: Client, task_id: str, *, follows: bool, **wanted: Any) -> Iterator[Mapping[str, Any]]:
    return client.events(task_id, **wanted) if follows else frames_of(client.logs(task_id, **wanted), task_id)


def _print(lines: Iterable[Line], *, has_times: bool, has_tags: bool) -> None:
    for time, tag, content, goes_on in lines:
        line = (time if has_times else b"") + (tag if has_tags else b"") + content
        if sys.stdout.isatty():
            click.echo(visible(line.decode(errors="replace").removesuffix("\n")), nl=not goes_on)
            continue
        is_bare = not has_times and not has_tags
        sys.stdout.buffer.write(line if is_bare or goes_on or line.endswith(b"\n") else line + b"\n")
        sys.stdout.buffer.flush()


def _followed(client: Client, task_id: str, **wanted: Any) -> Iterator[Line]:
    unfinished = b""
    for frame in client.events(task_id, **wanted):
        if frame["type"] == "end":
            continue
        line = _line(frame)
        if unfinished and line.stream != unfinished:
            yield Line(b"", b"", b"\n")
        yield line._replace(time=b"", stream=b"") if line.stream == unfinished else line
        unfinished = line.stream if line.goes_on else b""


def _line(frame: Mapping[str, Any]) -> Line:
    import json

    time = f"[{frame.get('timestamp')}] ".encode()
    if frame["type"] == "output":
        tag, text = _TAGS.get(str(frame.get("stream")), b"[EVENT] "), str(frame.get("data", ""))
        return Line(time, tag, text.encode(errors="replace"), goes_on=bool(frame.get("continued")))
    event = json.dumps(frame, ensure_ascii=False, separators=(",", ":"))
    return Line(time, b"[EVENT] ", event.encode(errors="replace") + b"\n")
