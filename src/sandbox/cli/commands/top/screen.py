"""The live screen of `sandbox top`: polls the server, draws the screen and reads keys in one event loop."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live

from sandbox.cli.commands.top.view import TopView, fetch_snapshot
from sandbox.cli.output.console import stdout_console
from sandbox.cli.output.event_printer import PendingReasonPoller, print_events
from sandbox.cli.output.text import escape_text
from sandbox.client import AsyncClient, ClientError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.cli.options import CliOptions

REFRESH_SECONDS = 1.0
PAGE_LINES = 10

_KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down",
    b"\r": "watch", b"\n": "watch",
    b"q": "leave", b"Q": "leave", b"": "leave",
}  # fmt: skip
_KEY = re.compile(rb"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_READ_BYTES = 1024
_MOVES = {"up": -1, "down": 1, "page up": -PAGE_LINES, "page down": PAGE_LINES}


def run_top(options: CliOptions) -> None:
    """Run until the user quits. Raises ClientError if the server is unreachable at the start."""
    console = stdout_console(has_color=options.has_color)
    view = TopView(options.server)
    while (task_id := asyncio.run(_run_screen(options, console, view))) is not None:
        _watch(options, console, task_id)


async def _run_screen(options: CliOptions, console: Console, view: TopView) -> str | None:
    """Return the id of the task to watch; None to quit."""
    async with AsyncClient(options.server, options.token) as client:
        view.update(await fetch_snapshot(client))
        changed, keys = asyncio.Event(), asyncio.Queue[bytes]()
        with _cbreak_mode(), Live(console=console, screen=True, auto_refresh=False) as live:
            descriptor = sys.stdin.fileno()
            asyncio.get_running_loop().add_reader(descriptor, lambda: _read(descriptor, keys))
            work = (_poll(client, view, changed), _draw(live, view, changed))
            running = [asyncio.create_task(one) for one in work]
            try:
                return await _handle_keys(keys, view, changed)
            finally:
                asyncio.get_running_loop().remove_reader(descriptor)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _poll(client: AsyncClient, view: TopView, changed: asyncio.Event) -> None:
    while True:
        changed.set()
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            view.update(await fetch_snapshot(client))
        except ClientError as error:
            view.show_error(f"{error.message} Retrying.")


async def _draw(live: Live, view: TopView, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        size = live.console.size
        lines = view.render(size.width, size.height, datetime.now(UTC))
        live.update(Group(*lines), refresh=True)


async def _handle_keys(keys: asyncio.Queue[bytes], view: TopView, changed: asyncio.Event) -> str | None:
    while True:
        key = _KEYS.get(await keys.get())
        if key == "leave":
            return None
        if key == "watch" and view.selected_id is not None:
            return view.selected_id
        view.move_selection(_MOVES.get(key or "", 0))
        changed.set()


def _watch(options: CliOptions, console: Console, task_id: str) -> None:
    """Print the task's events from the first one until ^C, or until enter is pressed after the task's end."""
    console.print(f"Task {escape_text(task_id)}; press ^C to return.\n", style="bold")
    with suppress(KeyboardInterrupt):
        with options.connect() as client:
            reason = PendingReasonPoller(options, task_id)
            print_events(client.events(task_id), console, pending_reason=reason)
        console.print("\nPress enter to return.", style="dim", end="")
        sys.stdin.readline()


@contextmanager
def _cbreak_mode() -> Iterator[None]:
    """Read keys one by one without echo; ^C still interrupts."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSAFLUSH)  # discard keys that were typed before
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _read(descriptor: int, keys: asyncio.Queue[bytes]) -> None:
    """Split the input into keys and queue them; at EOF, queue an empty key."""
    try:
        typed = os.read(descriptor, _READ_BYTES)
    except OSError:
        typed = b""
    for key in _KEY.findall(typed) or [b""]:
        keys.put_nowait(key)
