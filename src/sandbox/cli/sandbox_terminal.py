"""Connects the local terminal to a terminal in a sandbox and copies raw input and output.

Programs in the sandbox can send every control sequence that the local terminal supports: they can set its title, its
colors and, if the terminal allows that, the clipboard. The user accepts this by opening a terminal. When the connection
ends, all modes that a program may have enabled are reset, and the terminal's replies to programs are discarded.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from secrets import randbelow
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text, terminal_width, wrap_text
from sandbox.cli.output.task_outcome import task_id_for_hint
from sandbox.model.display_text import format_duration
from sandbox.model.task_state import FINAL_STATES, STATE_ORDER, TaskState

if TYPE_CHECKING:
    from sandbox.cli.options import CliOptions
    from sandbox.client import Client
    from sandbox.client.response_types import Task
    from sandbox.client.terminal import Terminal, TerminalEnd

DETACH_KEYS = "ctrl-p,ctrl-q"
SIZE_MAX = 1000
START_TIMEOUT_SECONDS = 3600.0
"""Maximum time to wait until a task's sandbox is running."""

OPEN_TIMEOUT_SECONDS = 5.0
"""Maximum time between the start of the agent and the moment when its sandbox accepts terminals."""

_POLL_SECONDS = 0.5
_AGENT = "agent"
_NO_TERMINAL = "no_terminal"
_UNAVAILABLE = "service_unavailable"
_STATES_BEFORE_RUNNING = frozenset(STATE_ORDER[: STATE_ORDER.index(TaskState.RUNNING)])
_CHUNK_BYTES = 4096
_UTF_8_AND_SHORT_REPLIES = b"\x1b%G\x1b F"
"""UTF-8, so bytes of letters are no control characters, and replies of 7-bit characters."""

_NO_MOUSE_REPORTS = b"\x1b[?9;1000;1001;1002;1003l\x1b[?1004;1005;1006;1015;1016l"
"""Disables reports of the mouse and of the focus."""

_POP_KEY_MODES = b"\x1b[<99u"  # each screen has a stack of key modes
_RESET = (
    b"\x18\x1b\x03\x1b\\\x1b<"  # abort a partial sequence, leave Tektronix mode, end a partial string, leave VT52 mode
    + _UTF_8_AND_SHORT_REPLIES
    + b"\x1bP0;1|\x1b\\\x1b[?1051;1052;1053;1060;1061l"  # no keys that type text which a program has chosen
    b"\x1b[4i\x1b[?4i"  # output goes to the screen, not to a printer
    + _POP_KEY_MODES
    + b"\x1b[?1049h\x1b[?1049l"  # the main screen; entering the other one first saves the position to restore
    + _POP_KEY_MODES
    + b"\x1b[=0u\x1b[>0m\x1b[>1m\x1b[>2m\x1b[>4m"  # keys send their usual codes
    + _NO_MOUSE_REPORTS
    + b"\x1b[?67;2004;2026;2031;2048;5522;9001l"  # no paste, color or size reports; no delayed output
    b"\x1b[!p\x1b7\x1b[?6;69l\x1b[r\x1b8"  # soft reset; no margins (some terminals then move the cursor)
    b"\x1b[2;4;20l\x1b[12h\x1b[?5l\x1b[?7;8;25h\x1b[0 q"  # unlocked keys, no local echo; wrapping, usual cursor
    b"\x0f\x1b(B\x1b]8;;\x1b\\\x1b[0m\x1b>\x1b[?1l\r"  # ASCII, no link, no colors, normal keypad
)
"""Resets what a program may have left enabled, without clearing the screen."""


def _reset_sequence(environment: Mapping[str, str]) -> bytes:
    """Return the reset, also for the terminal around GNU screen, which passes device control strings on to it."""
    if not environment.get("TERM", "").startswith("screen"):
        return _RESET
    return _RESET + b"\x1bP" + _UTF_8_AND_SHORT_REPLIES + _NO_MOUSE_REPORTS + b"\x1b\\"


_NEXT_LINE_AND_ERASE_BELOW = b"\r\n\x1b[J"
"""Keeps a message from being printed over what a full-screen program left below the cursor."""


_QUERY_COUNT = 4
"""Number of queries whose replies mark the end of the replies to programs: no program can predict all of them."""

_REPLY_SECONDS = 1.0
"""Maximum time to wait for the terminal's replies."""


def parse_detach_keys(ctx: click.Context, parameter: click.Parameter, value: str) -> bytes:
    """Parse detach keys in docker's notation: `ctrl-p,ctrl-q`, `a`, `ctrl-]`."""
    matches = [re.fullmatch(r"(?P<control>ctrl-)?(?P<key>[\x21-\x7e])", part) for part in value.split(",")]
    codes = [None if one is None else _key_code(one) for one in matches]
    if None in codes:
        message = "write keys as ctrl-p,ctrl-q: one character each, or ctrl- and one of a-z @ [ ] \\ ^ _"
        raise click.BadParameter(message, ctx, parameter)
    return bytes(code for code in codes if code is not None)


def _key_code(match: re.Match[str]) -> int | None:
    key = match["key"]
    if match["control"] is None:
        return ord(key)
    return ord(key.upper()) & 0x1F if key.isalpha() or key in "@[]\\^_" else None


def format_keys(keys: bytes) -> str:
    """Return keys as a user reads them: `Ctrl-P Ctrl-Q`."""
    return " ".join(f"Ctrl-{chr(key | 0x40)}" if key < 0x20 else chr(key) for key in keys)


_WRITE_ACCESS_MESSAGES = {True: b"", False: b"[Read-only: another client is typing, or you used --watch.]\r\n"}


class DetachKeyDetector:
    """Finds the detach keys in the input. Keys that may begin the sequence are held back until more input arrives."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._pending = b""

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """Return the input to send, and whether the detach keys were typed."""
        data = self._pending + typed
        before, keys, _ = data.partition(self._keys)
        if keys:
            return before, True
        longest = min(len(self._keys) - 1, len(data))
        held_length = next((length for length in range(longest, 0, -1) if self._keys.startswith(data[-length:])), 0)
        self._pending = data[len(data) - held_length :]
        return data[: len(data) - held_length], False


def run_terminal(
    options: CliOptions, task_id: str, keys: bytes, *, notice: str = "", **parameters: Any
) -> TerminalEnd | None:
    """Run until the terminal ends; return None if the user detached. Raises ClientError.

    If the task has not started yet, the function first waits until its sandbox is running. notice: printed before the
    terminal opens.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fail("Error: This command needs a terminal on stdin and stdout.", ExitCode.USAGE)
    size = os.get_terminal_size()
    parameters |= {"rows": min(size.lines, SIZE_MAX) or 24, "columns": min(size.columns, SIZE_MAX) or 80}
    parameters |= {"term": term} if (term := os.environ.get("TERM")) else {}
    from sandbox.client import ClientError

    with options.connect() as client:
        task = _wait_for_sandbox(client, task_id, is_agent=parameters.get("of") == _AGENT)
        deadline = time.monotonic() + (0 if task["state"] in FINAL_STATES else OPEN_TIMEOUT_SECONDS)
        while True:
            try:
                return asyncio.run(_run(options, task_id, DetachKeyDetector(keys), notice, parameters))
            except ClientError as error:
                # The sandbox accepts terminals shortly after the task has started to run.
                if error.code in {_NO_TERMINAL, _UNAVAILABLE} and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                elif error.code == _NO_TERMINAL:
                    _fail_without_terminal(client.status(task_id), error.message, parameters)
                else:
                    raise


def _wait_for_sandbox(client: Client, task_id: str, *, is_agent: bool) -> Task:
    """Wait until the task's sandbox is running or the task has ended, and print what the task is waiting for.

    is_agent: whether the agent's terminal is requested. Exits with an error if the agent will have no terminal, if the
    user presses ^C, or if the wait times out. Raises ClientError.
    """
    escaped_id = escape_text(task_id)
    again = f"sandbox task {'attach' if is_agent else 'shell'} {task_id_for_hint(task_id)}"
    deadline, shown = time.monotonic() + START_TIMEOUT_SECONDS, ""
    try:
        while True:
            task = client.status(task_id)
            if is_agent and not _has_terminal(task):
                message = f"The agent of task {task_id} has no terminal, because headless is true."
                _fail_without_terminal(task, message, {"of": _AGENT})
            if task["state"] not in _STATES_BEFORE_RUNNING:
                return task
            if time.monotonic() > deadline:
                waited = format_duration(START_TIMEOUT_SECONDS)
                message = f"Error: The sandbox of task {escaped_id} did not start within {waited}."
                fail(f"{message}\n  Try again: {again}", ExitCode.WAIT_TIMEOUT)
            if not shown:
                started = "the agent starts" if is_agent else "the sandbox is running"
                click.echo(f"Waiting until {started}. Press ^C to stop waiting.", err=True)
            reason = f"  {task['state']:<13} {task['state_message'] or ''}".rstrip()
            if reason != shown:
                click.echo("\n".join(wrap_text(reason, terminal_width(sys.stderr), " " * 16)), err=True)
            shown = reason
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        lines = [f"  Wait again: {again}", f"  Cancel it:  sandbox task cancel {task_id_for_hint(task_id)}"]
        fail("\n".join([f"\nStopped waiting. Task {escaped_id} continues.", *lines]), ExitCode.INTERRUPTED)


def _has_terminal(task: Task) -> bool:
    """Return whether the task's agent has a terminal. Older servers do not send the setting."""
    sections = [section for section in task["definition"].values() if isinstance(section, dict)]
    return not any(section.get("headless") is True for section in sections)


def _fail_without_terminal(task: Task, message: str, parameters: Mapping[str, Any]) -> NoReturn:
    """Exit with an error, because the requested terminal does not exist, and list commands to use instead."""
    shown_id, commands = task_id_for_hint(task["id"]), {}
    is_agent = parameters.get("of") == _AGENT
    if is_agent and not _has_terminal(task):
        commands["Run it again with a terminal"] = f"sandbox task rerun {shown_id}{_interactive_options(task)}"
    if task["state"] in FINAL_STATES:
        commands |= {"Output": f"sandbox task logs {shown_id}", "Changes": f"sandbox task diff {shown_id}"}
    else:
        commands["Output"] = f"sandbox task logs {shown_id} --follow"
        commands |= {"Shell": f"sandbox task shell {shown_id}"} if is_agent else {}
    cells = max(map(len, commands)) + 1
    lines = [f"  {f'{label}:':<{cells}} {command}" for label, command in commands.items()]
    fail("\n".join([f"Error: {escape_text(message)}", *lines]), ExitCode.CONFLICT)


def _interactive_options(task: Task) -> str:
    """Return the options that give the task's agent a terminal. A task with a terminal cannot be resumed."""
    sections = {key: value for key, value in task["definition"].items() if isinstance(value, dict)}
    changes = [f"{escape_text(key)}.headless=false" for key, section in sections.items() if "headless" in section]
    lifecycle = sections.get("lifecycle", {})
    changes += ["lifecycle.resume=false"] if lifecycle.get("resume") else []
    return "".join(f" --set {change}" for change in changes)


async def _run(
    options: CliOptions, task_id: str, detector: DetachKeyDetector, notice: str, parameters: dict[str, Any]
) -> TerminalEnd | None:
    from sandbox.client.terminal import open_terminal

    async with open_terminal(options.server, options.token, task_id, **parameters) as terminal:
        if notice:
            click.echo(notice, err=True)
        with _raw_mode(sys.stdin.fileno()):
            output_task = asyncio.create_task(_copy_output(terminal))
            input_task = asyncio.create_task(_copy_input(terminal, detector))
            try:
                await asyncio.wait({output_task, input_task}, return_when=asyncio.FIRST_COMPLETED)
                return output_task.result() if output_task.done() else input_task.result()
            finally:
                for task in (output_task, input_task):
                    task.cancel()
                await asyncio.gather(output_task, input_task, return_exceptions=True)


async def _copy_output(terminal: Terminal) -> TerminalEnd | None:
    from sandbox.client.terminal import TerminalEnd

    async for frame in terminal.messages():
        if isinstance(frame, TerminalEnd):
            return frame
        output = frame if isinstance(frame, bytes) else _WRITE_ACCESS_MESSAGES[frame]
        await asyncio.to_thread(_write_all, sys.stdout.fileno(), output)
    return None


async def _copy_input(terminal: Terminal, detector: DetachKeyDetector) -> None:
    """Copy input until the detach keys or EOF."""
    loop, keys = asyncio.get_running_loop(), asyncio.Queue[bytes]()
    descriptor = sys.stdin.fileno()
    resized = asyncio.Event()
    loop.add_reader(descriptor, lambda: keys.put_nowait(_read(descriptor)))
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    resize_task = asyncio.create_task(_sync_size(terminal, resized))
    try:
        while typed := await keys.get():
            data, detaches = detector.feed(typed)
            if data:
                await terminal.write(data)
            if detaches:
                return
    finally:
        resize_task.cancel()
        loop.remove_reader(descriptor)
        loop.remove_signal_handler(signal.SIGWINCH)
        await asyncio.gather(resize_task, return_exceptions=True)


async def _sync_size(terminal: Terminal, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        size = os.get_terminal_size()
        await terminal.resize(size.lines or 24, size.columns or 80)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _CHUNK_BYTES)
    except OSError:
        return b""


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _raw_mode(descriptor: int) -> Iterator[None]:
    """Set raw mode; reset all modes and restore the terminal's settings at the end."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        with suppress(OSError):
            _write_all(sys.stdout.fileno(), _reset_sequence(os.environ))
            _discard_replies(descriptor)
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def _discard_replies(descriptor: int) -> None:
    """Discard the replies that the terminal may still send to queries from programs in the sandbox.

    The user's shell would read them as typed text, and some terminals reply with text that a program has chosen. A
    terminal replies in the order of the queries. This function moves the cursor to random positions, queries each
    position, and discards all input up to the replies with these positions. Raises OSError.
    """
    size = os.get_terminal_size(descriptor)
    positions = [(randbelow(size.lines or 24) + 1, randbelow(size.columns or 80) + 1) for _ in range(_QUERY_COUNT)]
    queries = "".join(f"\x1b[{row};{column}H\x1b[6n" for row, column in positions)
    expected = "".join(f"\x1b[{row};{column}R" for row, column in positions).encode()
    _write_all(sys.stdout.fileno(), f"\x1b7{queries}\x1b8".encode())
    received, deadline = b"", time.monotonic() + _REPLY_SECONDS
    while expected not in received and (remaining_seconds := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], remaining_seconds)[0] or not (chunk := _read(descriptor)):
            return
        received = received[-len(expected) :] + chunk


def exit_with_terminal(result: TerminalEnd | None, task_id: str, on_detach: str) -> None:
    """Exit with the terminal's exit code, if it is known."""
    if result is None:
        _write_all(sys.stdout.fileno(), _NEXT_LINE_AND_ERASE_BELOW)
        click.echo(on_detach, err=True)
        return
    if result.message:
        click.echo(escape_text(result.message), err=True)
    if result.exit_code is None:
        fail(
            f"The terminal was closed. See the task: sandbox task status {escape_text(task_id)}", ExitCode.SERVER_ERROR
        )
    raise click.exceptions.Exit(result.exit_code)
