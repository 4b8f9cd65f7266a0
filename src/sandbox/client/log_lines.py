"""Lines of a log: bytes in, whole lines out."""

from __future__ import annotations


class LogLines:
    """Puts together what the network has cut; every line has its newline."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes."""
        if b"\n" not in chunk:
            self._pending.append(chunk)
            return []
        *lines, rest = b"".join([*self._pending, chunk]).split(b"\n")
        self._pending = [rest]
        return [line + b"\n" for line in lines]

    def rest(self) -> list[bytes]:
        """The last line, where it had no newline."""
        last = b"".join(self._pending)
        return [last + b"\n"] if last else []
