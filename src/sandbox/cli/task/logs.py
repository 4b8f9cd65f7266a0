"""`sandbox task logs`"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.answer import print_json_lines
from sandbox.cli.failures import watching
from sandbox.cli.options import chosen, output_options, server_options
from sandbox.cli.time_options import past_time
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from sandbox.client import Client

_LINE = re.compile(rb"(\[[^\] ]{1,40}\] )(\[(?:STDOUT|STDERR|EVENT)\] )(.*\n)", re.DOTALL)
_TAGS = {"stdout": b"[STDOUT] ", "stderr": b"[STDERR] "}

Line = tuple[bytes, bytes, bytes]
"""Time, stream and content, as the API writes them; the content with its newline."""


@click.command()
@click.argument("task_id", metavar="TASK_ID")
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the task's end.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines; 0 for all.")
@click.option("--stream", type=click.Choice(["all", "stdout", "stderr", "events"]), default="all", show_default=True)
@click.option("--since", callback=past_time, metavar="TIME", help="Only what came since: 2026-01-29T10:10:15Z, or 10m.")
@click.option("--timestamps", is_flag=True, help="Put the time before each line.")
@server_options
@output_options("text", "json", short=False)
def logs(task_id: str, follows: bool, **wanted: Any) -> None:
    """Print a task's output and events.

    Lines carry the stream that they belong to; with --stream stdout or stderr they are bare.
    """
    options, has_times = chosen(), wanted.pop("timestamps")
    is_json = options.format == "json"
    if is_json and not follows:
        raise click.UsageError("Logs come as JSON only while they are followed: add --follow.")
    with options.connect() as client, watching(task_id):
        if is_json:
            print_json_lines(client.events(task_id, **wanted))
            return
        lines = _followed(client, task_id, **wanted) if follows else map(_parts, client.logs(task_id, **wanted))
        _print(lines, has_times=has_times, has_tags=wanted["stream"] not in _TAGS)


def _print(lines: Iterable[Line], *, has_times: bool, has_tags: bool) -> None:
    for time, tag, content in lines:
        line = (time if has_times else b"") + (tag if has_tags else b"") + content
        if sys.stdout.isatty():
            click.echo(visible(line.decode(errors="replace").removesuffix("\n")))
            continue
        is_bare = not has_times and not has_tags
        sys.stdout.buffer.write(line if is_bare or line.endswith(b"\n") else line + b"\n")
        sys.stdout.buffer.flush()


def _parts(line: bytes) -> Line:
    match = _LINE.fullmatch(line)
    return (match[1], match[2], match[3]) if match else (b"", b"", line)


def _followed(client: Client, task_id: str, **wanted: Any) -> Iterator[Line]:
    import json

    for frame in client.events(task_id, **wanted):
        time, tag = f"[{frame.get('timestamp')}] ".encode(), _TAGS.get(str(frame.get("stream")), b"[EVENT] ")
        if frame["type"] == "output":
            yield time, tag, str(frame.get("data", "")).encode(errors="replace")
        elif frame["type"] != "end":
            event = json.dumps(frame, ensure_ascii=False, separators=(",", ":"))
            yield time, b"[EVENT] ", event.encode(errors="replace") + b"\n"
