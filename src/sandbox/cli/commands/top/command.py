"""The `sandbox top` command: polls the server, draws the screen and reads keys in one event loop."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.live import Live

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.commands.top.screen_content import TopView, fetch_snapshot
from sandbox.cli.errors import ExitCode
from sandbox.cli.options import CliOptions, common_options, current_options
from sandbox.cli.output.console import escape_text, print_json, stdout_console
from sandbox.cli.output.event_printer import PendingReasonPoller, print_events
from sandbox.cli.output.table import print_table
from sandbox.client import AsyncClient, ClientError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.cli.options import CliOptions


REFRESH_INTERVAL_SECONDS = 1.0
PAGE_LINES = 10

_KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down",
    b"\r": "watch", b"\n": "watch",
    b"/": "search", b"f": "filter", b"c": "cancel", b"?": "help",
    b"q": "leave", b"Q": "leave", b"": "leave",
}  # fmt: skip
_KEY = re.compile(rb"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_ENTER_KEYS = {b"\r", b"\n"}
_RETURN_KEYS = {b"q", b"Q", b"\x1b"}
"""Keys that return from a task's events to the list of tasks."""

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
        view.update(await fetch_snapshot(client, view.filter))
        changed, refresh_requested, keys = asyncio.Event(), asyncio.Event(), asyncio.Queue[bytes]()
        with _cbreak_mode(), Live(console=console, screen=True, auto_refresh=False) as live:
            descriptor = sys.stdin.fileno()
            asyncio.get_running_loop().add_reader(descriptor, lambda: _read(descriptor, keys))
            work = (_poll(client, view, changed, refresh_requested), _draw(live, view, changed))
            running = [asyncio.create_task(one) for one in work]
            try:
                return await _KeyHandler(client, view, changed, refresh_requested).run(keys)
            finally:
                asyncio.get_running_loop().remove_reader(descriptor)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _poll(client: AsyncClient, view: TopView, changed: asyncio.Event, refresh_requested: asyncio.Event) -> None:
    """Fetch the data once per second, and immediately if a refresh was requested, for example by a new filter."""
    while True:
        changed.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(refresh_requested.wait(), REFRESH_INTERVAL_SECONDS)
        refresh_requested.clear()
        try:
            view.update(await fetch_snapshot(client, view.filter))
        except ClientError as error:
            view.show_error(f"{error.message} Retrying.")


async def _draw(live: Live, view: TopView, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        size = live.console.size
        lines = view.render(size.width, size.height, datetime.now(UTC))
        live.update(Group(*lines), refresh=True)


class _KeyHandler:
    def __init__(
        self, client: AsyncClient, view: TopView, changed: asyncio.Event, refresh_requested: asyncio.Event
    ) -> None:
        self._client = client
        self._view = view
        self._changed = changed
        self._refresh_requested = refresh_requested

    async def run(self, keys: asyncio.Queue[bytes]) -> str | None:
        """Handle keys; return the id of the task to watch, or None to quit."""
        view = self._view
        while typed := await keys.get():
            view.show_notice("")
            if view.is_help_open:
                view.toggle_help()
            elif view.search_input is not None:
                self._request_refresh_if(view.type_search(typed))
            elif view.has_question:
                await self._answer_cancel(typed)
            else:
                action = _KEYS.get(typed, "")
                if action == "leave":
                    return None
                if action == "watch" and view.selected_id is not None:
                    return view.selected_id
                self._act(action)
            self._changed.set()
        return None

    def _act(self, action: str) -> None:
        self._view.move_selection(_MOVES.get(action, 0))
        match action:
            case "search":
                self._view.open_search()
            case "filter":
                self._view.filter_next_states()
                self._refresh_requested.set()
            case "cancel":
                self._view.ask_cancel()
            case "help":
                self._view.toggle_help()

    async def _answer_cancel(self, typed: bytes) -> None:
        task_id = self._view.answer_cancel(typed)
        if task_id is None:
            return
        try:
            self._view.show_notice((await self._client.cancel(task_id))["message"])
        except ClientError as error:
            self._view.show_notice(error.message)
        self._refresh_requested.set()

    def _request_refresh_if(self, is_requested: bool) -> None:
        if is_requested:
            self._refresh_requested.set()


def _watch(options: CliOptions, console: Console, task_id: str) -> None:
    """Print all of the task's events until the user presses a key to return. After the task's end, Enter works too."""
    keys = set(_RETURN_KEYS)
    with (
        _alternate_screen(console),
        suppress(KeyboardInterrupt),
        _cbreak_mode(),
        _interrupting_keys(keys) as reader,
    ):
        console.print(f"Task {escape_text(task_id)}; press q to return.\n", style="bold")
        with options.connect() as client:
            reason = PendingReasonPoller(options, task_id)
            print_events(client.events(task_id), console, pending_reason=reason)
        keys |= _ENTER_KEYS
        console.print("\nPress enter to return.", style="dim")
        reader.join()


@contextmanager
def _alternate_screen(console: Console) -> Iterator[None]:
    """Print to the alternate screen, so that nothing remains in the window afterwards."""
    console.set_alt_screen()
    try:
        yield
    finally:
        console.set_alt_screen(False)


@contextmanager
def _interrupting_keys(keys: Set[bytes]) -> Iterator[threading.Thread]:
    """Read keys in a thread. The first key from `keys` interrupts the main thread like ^C, even during a request."""
    descriptor, (stop_reader, stop_writer) = sys.stdin.fileno(), os.pipe()

    def read() -> None:
        while descriptor in select.select([descriptor, stop_reader], [], [])[0]:
            typed = b""
            with suppress(OSError):  # the terminal was closed
                typed = os.read(descriptor, _READ_BYTES)
            if not typed or not keys.isdisjoint(_KEY.findall(typed)):
                signal.pthread_kill(main_thread, signal.SIGINT)
                return

    main_thread = threading.get_ident()
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        os.close(stop_writer)  # wakes the thread
        thread.join()
        os.close(stop_reader)


@contextmanager
def _cbreak_mode() -> Iterator[None]:
    """Read keys one by one without echo; ^C still interrupts."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSAFLUSH)  # discard keys that were typed earlier
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


@command(
    epilog=help_examples(
        "sandbox top",
        "sandbox top --format json",
        note="Without a terminal, the command prints one table, or one object with --format json, and exits.",
    )
)
@common_options
def top() -> None:
    """Watch all tasks on one screen.

    Lists active tasks first, then pending tasks with the reason why they wait, then the tasks that ended most recently.
    Generated ids are shortened.

    Use the arrow keys to select a task, and Enter to watch it; q or Esc returns to the list. Press / to search, f to
    filter by state, c to cancel the selected task after confirmation, ? to list the keys and the filters, and q to
    quit.
    """
    options = current_options()
    if options.format != "text" or not (sys.stdout.isatty() and sys.stdin.isatty()):
        _print_once(options)
        return
    try:
        run_top(options)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None  # print no message: ^C is a normal way to quit


def _print_once(options: CliOptions) -> None:
    from sandbox.cli.commands.top.screen_content import COLUMNS, OMITTABLE_COLUMNS, Snapshot, fetch_snapshot, table_rows
    from sandbox.client import AsyncClient

    async def fetch() -> Snapshot:
        async with AsyncClient(options.server, options.token) as client:
            return await fetch_snapshot(client)

    snapshot = asyncio.run(fetch())
    if options.format == "json":
        print_json({"health": snapshot.health, "tasks": snapshot.tasks})
        return
    console = stdout_console(has_color=options.has_color)
    rows = table_rows(snapshot.tasks, datetime.now(UTC), on_terminal=console.is_terminal)
    if rows:
        print_table(console, COLUMNS, rows, has_border=options.format == "table", omittable=OMITTABLE_COLUMNS)
    else:
        click.echo("No tasks yet.", err=True)
