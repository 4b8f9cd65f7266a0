"""Cuts a stream of bytes into lines and joins their parts, with bounds on what a line may hold in memory."""

from collections.abc import Iterator

from sandbox.model.limits import HEARD_LINE_BYTES_MAX, OUTPUT_LINE_BYTES_MAX


class LineSplitter:
    """Feed chunks, get `(bytes, continued)`; concatenated, the pieces are the stream."""

    def __init__(self, line_bytes_max: int = OUTPUT_LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bool]]:
        """Whole lines, newline included; a line over the bound in parts, all but its last `continued`."""
        scanned = len(self._pending)
        self._pending += chunk
        begin = 0
        while (newline := self._pending.find(b"\n", max(begin, scanned))) >= 0:
            yield from self._parts(begin, newline + 1)
            begin = newline + 1
        del self._pending[:begin]
        while len(self._pending) > self._line_bytes_max:
            yield bytes(self._pending[: self._line_bytes_max]), True
            del self._pending[: self._line_bytes_max]

    def end(self) -> Iterator[tuple[bytes, bool]]:
        """What is left when the stream has ended without a newline."""
        yield from self._parts(0, len(self._pending))
        self._pending.clear()

    def _parts(self, begin: int, end: int) -> Iterator[tuple[bytes, bool]]:
        while end - begin > self._line_bytes_max:
            yield bytes(self._pending[begin : begin + self._line_bytes_max]), True
            begin += self._line_bytes_max
        if end > begin:
            yield bytes(self._pending[begin:end]), False


class LineJoiner:
    """Feed what a splitter gives, get whole lines. A line over the bound is let go of as soon as it is."""

    def __init__(self, line_bytes_max: int = HEARD_LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def feed(self, piece: bytes, continued: bool) -> bytes | None:
        """The line that the piece ends; None within a line, and at the end of one over the bound."""
        self._size_bytes += len(piece)
        if self._size_bytes <= self._line_bytes_max:
            self._parts.append(piece)
        else:
            self._parts.clear()
        if continued:
            return None
        line = b"".join(self._parts)
        self._parts.clear()
        self._size_bytes = 0
        return line or None
