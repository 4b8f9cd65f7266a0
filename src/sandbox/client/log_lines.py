"""Lines of a log: bytes in, whole lines out."""

from __future__ import annotations


class LogLines:
    """Puts together what the network has cut; every line has its newline."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        return [line + b"\n" for line in lines]

    def rest(self) -> list[bytes]:
        """The last line, where it had no newline."""
        return [self._pending + b"\n"] if self._pending else []
