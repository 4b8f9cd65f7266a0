"""The screen of `sandbox top` while it is live: asks, draws, and reads keys, all in one loop."""

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

from sandbox.cli.commands.top.view import Page, take_snapshot
from sandbox.cli.output.console import output_console
from sandbox.cli.output.event_printer import PendingReason, is_interactive, tell
from sandbox.cli.output.text import visible
from sandbox.client import AsyncClient, ClientError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.cli.options import Chosen

ASK_EVERY_SECONDS = 1.0
PAGE_LINES = 10

_KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down",
    b"\r": "watch", b"\n": "watch",
    b"q": "leave", b"Q": "leave", b"": "leave",
}  # fmt: skip
_KEY = re.compile(rb"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_TYPED_BYTES = 1024
_MOVES = {"up": -1, "down": 1, "page up": -PAGE_LINES, "page down": PAGE_LINES}


def watch_all(options: Chosen) -> None:
    """Until somebody leaves. Raises ClientError when the server is not reached at the beginning."""
    console = output_console(has_color=options.has_color)
    page = Page(options.server)
    while (task_id := asyncio.run(_live(options, console, page))) is not None:
        _watch(options, console, task_id)


async def _live(options: Chosen, console: Console, page: Page) -> str | None:
    """The task to be watched; None to leave."""
    async with AsyncClient(options.server, options.token) as client:
        page.show(await take_snapshot(client))
        changed, keys = asyncio.Event(), asyncio.Queue[bytes]()
        with _keys_as_typed(), Live(console=console, screen=True, auto_refresh=False) as live:
            descriptor = sys.stdin.fileno()
            asyncio.get_running_loop().add_reader(descriptor, lambda: _read(descriptor, keys))
            work = (_ask(client, page, changed), _draw(live, page, changed))
            running = [asyncio.create_task(one) for one in work]
            try:
                return await _obey(keys, page, changed)
            finally:
                asyncio.get_running_loop().remove_reader(descriptor)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _ask(client: AsyncClient, page: Page, changed: asyncio.Event) -> None:
    while True:
        changed.set()
        await asyncio.sleep(ASK_EVERY_SECONDS)
        try:
            page.show(await take_snapshot(client))
        except ClientError as error:
            page.complaint = f"{error.message} Asking again."


async def _draw(live: Live, page: Page, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        size = live.console.size
        lines = page.lines(size.width, size.height, datetime.now(UTC))
        live.update(Group(*lines), refresh=True)


async def _obey(keys: asyncio.Queue[bytes], page: Page, changed: asyncio.Event) -> str | None:
    while True:
        key = _KEYS.get(await keys.get())
        if key == "leave":
            return None
        if key == "watch" and page.chosen_id is not None:
            return page.chosen_id
        page.move(_MOVES.get(key or "", 0))
        changed.set()


def _watch(options: Chosen, console: Console, task_id: str) -> None:
    """The task's story from its beginning; ^C, or enter after its end, goes back."""
    console.print(f"Task {visible(task_id)}; ^C goes back.\n", style="bold")
    with suppress(KeyboardInterrupt):
        with options.connect() as client:
            is_believed = not is_interactive(client.status(task_id))
            reason = PendingReason(options, task_id)
            tell(client.events(task_id), console, is_believed=is_believed, why_pending=reason)
        console.print("\nenter goes back.", style="dim", end="")
        sys.stdin.readline()


@contextmanager
def _keys_as_typed() -> Iterator[None]:
    """Keys come one by one and are not shown; ^C stays what it is."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSAFLUSH)  # what was typed before was not meant for this
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _read(descriptor: int, keys: asyncio.Queue[bytes]) -> None:
    """Who types fast has several keys in one go; the end of the terminal is the empty one."""
    try:
        typed = os.read(descriptor, _TYPED_BYTES)
    except OSError:
        typed = b""
    for key in _KEY.findall(typed) or [b""]:
        keys.put_nowait(key)
