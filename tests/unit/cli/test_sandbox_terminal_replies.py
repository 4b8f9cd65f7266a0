"""Replies of the user's terminal to queries of programs in a sandbox."""

import os
import pty
import re
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sandbox.cli import sandbox_terminal

_SEQUENCES = re.compile(rb"\x1b\[(?:(?P<row>\d+);(?P<column>\d+)H|(?P<query>6n))")
LATENCY_SECONDS = 0.1


class Emulator:
    """A terminal at the other end of a pty. It reports the cursor's position after a delay, as over a network."""

    def __init__(self, master: int, *, replies: bool) -> None:
        self._master = master
        self._replies = replies
        self._position = b"1;1"
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped = True
        self._thread.join()

    def _run(self) -> None:
        pending: list[tuple[float, bytes]] = []
        while not self._is_stopped:
            while pending and pending[0][0] < time.monotonic():
                os.write(self._master, pending.pop(0)[1])
            if select.select([self._master], [], [], 0.01)[0]:
                for found in _SEQUENCES.finditer(os.read(self._master, 65536)):
                    if not found["query"]:
                        self._position = found["row"] + b";" + found["column"]
                    elif self._replies:
                        pending.append((time.monotonic() + LATENCY_SECONDS, b"\x1b[" + self._position + b"R"))


@contextmanager
def connect_terminal(monkeypatch: pytest.MonkeyPatch, *, replies: bool) -> Iterator[tuple[int, int]]:
    """Yield the terminal's master and the descriptor that the command line uses."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    emulator = Emulator(master, replies=replies)
    try:
        with os.fdopen(os.dup(slave), "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            yield master, slave
    finally:
        emulator.stop()
        os.close(master)
        os.close(slave)


def read_typed(descriptor: int, seconds: float) -> bytes:
    """Return what the user's shell would read after the command."""
    settings = termios.tcgetattr(descriptor)
    settings[3] &= ~termios.ICANON
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)
    return os.read(descriptor, 65536) if select.select([descriptor], [], [], seconds)[0] else b""


def test_replies_to_queries_of_the_sandbox_do_not_reach_the_shell(monkeypatch: pytest.MonkeyPatch):
    with connect_terminal(monkeypatch, replies=True) as (_, slave):
        with sandbox_terminal._raw_mode(slave):
            os.write(slave, b"\x1b[6n" * 20)
        assert read_typed(slave, 5 * LATENCY_SECONDS) == b""


def test_input_typed_after_the_end_reaches_the_shell(monkeypatch: pytest.MonkeyPatch):
    with connect_terminal(monkeypatch, replies=True) as (master, slave):
        started_at = time.monotonic()
        with sandbox_terminal._raw_mode(slave):
            pass
        assert time.monotonic() - started_at < sandbox_terminal._REPLY_SECONDS
        os.write(master, b"ls\n")
        assert read_typed(slave, 5.0) == b"ls\n"


def test_wait_for_a_terminal_that_does_not_reply_is_limited(monkeypatch: pytest.MonkeyPatch):
    with connect_terminal(monkeypatch, replies=False) as (master, slave):
        started_at = time.monotonic()
        with sandbox_terminal._raw_mode(slave):
            os.write(master, b"\x1b[1;1R" * 20)
        assert time.monotonic() - started_at < sandbox_terminal._REPLY_SECONDS + 2
        assert read_typed(slave, 0.1) == b""
