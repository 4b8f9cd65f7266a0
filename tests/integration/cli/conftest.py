"""A recorded API, and the command line as a process that speaks to it."""

import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

import pytest

from doubles.forked_commands import ForkedCommand
from doubles.forked_commands import run as run_forked
from doubles.recorded_api import RecordedApi

END = b"<nothing more is shown>"


@pytest.fixture
def api():
    """An API that knows nothing yet."""
    with RecordedApi().running() as api:
        yield api


@pytest.fixture
def environment(api, tmp_path):
    """What the process finds: the server, a proxy that must not be asked, and a home of its own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "SANDBOX_SERVER": api.url,
        "HTTP_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
        "FORCE_COLOR": "1",
        "PYTHONWARNINGS": "error",
        "LANG": "C.UTF-8",
    }


@pytest.fixture
def sandbox(environment, tmp_path):
    """Run `sandbox …` to its end."""

    def run(*arguments: str, stdin: bytes = b"", cwd: Path = tmp_path) -> subprocess.CompletedProcess[bytes]:
        return run_forked(*arguments, stdin=stdin, env=environment, cwd=cwd)

    return run


@pytest.fixture
def sandbox_process(environment, tmp_path):
    """Start `sandbox …`; whatever still runs at the test's end is ended."""
    started = []

    def start(*arguments: str, cwd: Path = tmp_path, **streams) -> subprocess.Popen[bytes]:
        process = ForkedCommand(arguments, env=environment, cwd=cwd, **streams)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.seen = b""

    def read_until(self, wanted: bytes, seconds: float = 30) -> bytes:
        """Everything until `wanted` has been shown."""
        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            readable, _, _ = select.select([self.ours], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"{wanted!r} was not shown; shown was {self.seen!r}"
            self.seen += os.read(self.ours, 65536)
        return self.seen

    def read_to_end(self, process: subprocess.Popen[bytes], seconds: float = 60) -> bytes:
        """Everything that a process shows from now on until it has ended."""
        deadline, begin = time.monotonic() + seconds, len(self.seen)
        while process.poll() is None:
            assert time.monotonic() < deadline, f"it has not ended; shown was {self.seen!r}"
            if select.select([self.ours], [], [], 0.02)[0]:
                self.seen += os.read(self.ours, 65536)
        os.write(self.theirs, END)  # what was shown before comes before it, and may come late
        self.seen = self.read_until(END).removesuffix(END)
        return self.seen[begin:]

    def resize(self, columns: int, lines: int = 45) -> None:
        termios.tcsetwinsize(self.ours, (lines, columns))

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    os.close(terminal.ours)
    os.close(terminal.theirs)


@pytest.fixture
def on_terminal(sandbox_process, terminal):
    """Start `sandbox …` on the terminal."""
    theirs = terminal.theirs
    return lambda *arguments, **where: sandbox_process(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, **where)
