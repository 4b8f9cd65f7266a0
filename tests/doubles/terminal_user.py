"""A user at a pseudo-terminal: types, reads, and resizes the window."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

TIMEOUT_SECONDS = 40.0


class TerminalUser:
    """Runs the command line on a pseudo-terminal."""

    def __init__(self, *arguments, server, rows=30, columns=100):
        self.output = b""
        environment = {
            "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "TERM": "xterm", "LANG": "C.UTF-8",
            "SANDBOX_SERVER": server,
        }  # fmt: skip
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "sandbox", *arguments], environment)
        self.resize(rows, columns)

    def resize(self, rows, columns):
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self._terminal, text.encode() if isinstance(text, str) else text)

    def expect(self, pattern, seconds=TIMEOUT_SECONDS):
        """Wait for a match in the output and return it; drop the output up to the end of the match."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern.encode(), self.output)) is None:
            assert time.monotonic() < deadline, f"waited for {pattern!r}, got {self.output[-3000:]!r}"
            assert self._read(), f"the command ended before {pattern!r}: {self.output[-3000:]!r}"
        self.output = self.output[match.end() :]
        return match

    def type_until_echoed(self, text, seconds=TIMEOUT_SECONDS):
        """Type the text repeatedly until it is echoed, since input is ignored while another terminal is the writer."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.output:
            assert time.monotonic() < deadline, f"{text!r} was not echoed, got {self.output[-3000:]!r}"
            self.type(text)
            read_until = time.monotonic() + 0.5
            while time.monotonic() < read_until:
                self._read(0.1)

    def exit_code(self, seconds=TIMEOUT_SECONDS):
        """Wait for the command and return its exit code."""
        deadline = time.monotonic() + seconds
        while self._pid:
            assert time.monotonic() < deadline, f"the command does not end: {self.output[-3000:]!r}"
            self._read(0.1)
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def close(self):
        """Close the window."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        os.close(self._terminal)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self, seconds=0.5):
        """Read more output; return False once the other end is closed."""
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return True
        try:
            chunk = os.read(self._terminal, 65536)
        except OSError:
            return False
        self.output += chunk
        return bool(chunk)
