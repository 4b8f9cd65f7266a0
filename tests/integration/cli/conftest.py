"""Fixtures: a fake API, and the CLI as a process that calls it."""

import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

import pytest

from doubles.fake_api import FakeApi
from doubles.forked_commands import ForkedCommand
from doubles.forked_commands import run as run_forked

END_OF_OUTPUT_MARKER = b"<end of output>"


@pytest.fixture
def api():
    """A fake API that records requests; the test adds the responses."""
    with FakeApi().running() as api:
        yield api


@pytest.fixture
def environment(api, tmp_path):
    """The environment of the process: the server, a proxy that must not be used, and a separate home."""
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
def run_cli(environment, tmp_path):
    """Run `sandbox …` until it exits."""

    def run(*arguments: str, stdin: bytes = b"", cwd: Path = tmp_path) -> subprocess.CompletedProcess[bytes]:
        return run_forked(*arguments, stdin=stdin, env=environment, cwd=cwd)

    return run


@pytest.fixture
def start_cli(environment, tmp_path):
    """Start `sandbox …`; kill running processes at the end of the test."""
    processes = []

    def start(*arguments: str, cwd: Path = tmp_path, **streams) -> subprocess.Popen[bytes]:
        process = ForkedCommand(arguments, env=environment, cwd=cwd, **streams)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class Terminal:
    """Both ends of a pseudo-terminal, and the output that has been read so far."""

    def __init__(self) -> None:
        self.parent_fd, self.child_fd = pty.openpty()
        self.output = b""

    def read_until(self, wanted: bytes, seconds: float = 30) -> bytes:
        """Read and return the output until it contains `wanted`."""
        deadline = time.monotonic() + seconds
        while wanted not in self.output:
            readable, _, _ = select.select([self.parent_fd], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"{wanted!r} is missing in the output {self.output!r}"
            self.output += os.read(self.parent_fd, 65536)
        return self.output

    def read_to_end(self, process: subprocess.Popen[bytes], seconds: float = 60) -> bytes:
        """Return all output of the process from now until it exits."""
        deadline, start_index = time.monotonic() + seconds, len(self.output)
        while process.poll() is None:
            assert time.monotonic() < deadline, f"the process is still running; output: {self.output!r}"
            if select.select([self.parent_fd], [], [], 0.02)[0]:
                self.output += os.read(self.parent_fd, 65536)
        # The last output of the process may arrive late, but before this marker.
        os.write(self.child_fd, END_OF_OUTPUT_MARKER)
        self.output = self.read_until(END_OF_OUTPUT_MARKER).removesuffix(END_OF_OUTPUT_MARKER)
        return self.output[start_index:]

    def resize(self, columns: int, lines: int = 45) -> None:
        termios.tcsetwinsize(self.parent_fd, (lines, columns))

    def type(self, keys: bytes) -> None:
        os.write(self.parent_fd, keys)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    os.close(terminal.parent_fd)
    os.close(terminal.child_fd)


@pytest.fixture
def on_terminal(start_cli, terminal):
    """Start `sandbox …` on the terminal."""
    child_fd = terminal.child_fd
    return lambda *arguments, **options: start_cli(
        *arguments, stdin=child_fd, stdout=child_fd, stderr=child_fd, **options
    )
