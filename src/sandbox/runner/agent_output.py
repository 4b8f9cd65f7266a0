"""What comes out of the agent: redacted, cut into lines, written down, listened to."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.secrets import Redactor, StreamRedactor
from sandbox.model.events import Event, Gap, Output, Stream
from sandbox.model.limits import (
    OUTPUT_BURST_BYTES,
    OUTPUT_BYTES_MAX,
    OUTPUT_BYTES_PER_SECOND,
    OUTPUT_LINE_BYTES_MAX,
    PARSED_LINE_BYTES_MAX,
    REDACTION_HOLD_SECONDS,
)
from sandbox.model.task import Task
from sandbox.system.cpu_throttle import CpuQueue

_RECORD_OVERHEAD_BYTES = 128
"""What a record takes in the journal beside its text: a flood of empty lines is a flood all the same."""


def earlier_output_bytes(task: Task) -> int:
    """Of what earlier attempts wrote down. Which of their records were output is told nowhere: all count as such."""
    return task.progress.output_bytes + task.last_seq * _RECORD_OVERHEAD_BYTES


class OutputQuota:
    """Holds back whoever writes too fast, loses nothing of it, and ends at a total.

    left_out_bytes: what came after the total was used up. used_bytes: what earlier attempts cost.
    """

    def __init__(self, clock: Clock, used_bytes: int = 0) -> None:
        self.dropped_bytes = 0
        self._clock = clock
        self._used_bytes = used_bytes
        self._burst_bytes = float(OUTPUT_BURST_BYTES)
        self._refilled_at = clock.monotonic()

    async def acquire(self, size_bytes: int) -> bool:
        """Whether a piece may be written down; returns when it is its turn."""
        cost_bytes = size_bytes + _RECORD_OVERHEAD_BYTES
        if self._used_bytes + cost_bytes > OUTPUT_BYTES_MAX:
            self.dropped_bytes += size_bytes
            return False
        self._used_bytes += cost_bytes
        self._burst_bytes -= cost_bytes
        if self._burst_bytes < 0:
            await self._throttle()
        return True

    async def _throttle(self) -> None:
        now = self._clock.monotonic()
        gained_bytes = (now - self._refilled_at) * OUTPUT_BYTES_PER_SECOND
        self._burst_bytes = min(self._burst_bytes + gained_bytes, OUTPUT_BURST_BYTES)
        self._refilled_at = now
        if self._burst_bytes < 0:
            await asyncio.sleep(-self._burst_bytes / OUTPUT_BYTES_PER_SECOND)


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

    def flush(self) -> Iterator[tuple[bytes, bool]]:
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

    def __init__(self, line_bytes_max: int = PARSED_LINE_BYTES_MAX) -> None:
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


_OUTPUT_LIMIT_MESSAGE = f"Output over {OUTPUT_BYTES_MAX // 1024**2} MiB is not kept; have the agent write it to a file."
_CHUNK_BYTES = 64 * 1024
_STDERR_TAIL_BYTES = 8 * 1024
_LINES_PER_TURN = 100
"""Lines written down before everything else that the runner has to do gets a turn."""


class AgentOutput:
    """Takes stdout and stderr; everything behind it sees redacted lines only.

    record: writes an event down. heard: told of the size of every chunk. listen: given each whole line of stdout.
    stdout_as: the stream that the lines of stdout are written down as. What the allowance leaves out is listened to.
    queue: where output waits for the runner's CPU budget.
    moved_bytes: grows while anything is read, or what was read is written down.
    """

    def __init__(
        self,
        record: Callable[[Event], object],
        on_chunk: Callable[[int], None],
        on_line: Callable[[bytes], None],
        *,
        redaction: Redactor | None,
        stdout_stream: Stream,
        quota: OutputQuota,
        queue: CpuQueue,
    ) -> None:
        self._queue = queue
        self.processed_bytes = 0
        self._quota = quota
        self._record = record
        self._on_chunk = on_chunk
        self._on_line = on_line
        self._redaction = redaction
        self._stdout_stream = stdout_stream
        self._stderr_tail: deque[bytes] = deque()
        self._stderr_tail_bytes = 0
        self._line_joiner = LineJoiner()
        self._has_recorded_gap = False

    @property
    def stderr_tail(self) -> bytes:
        """The last few kilobytes of stderr."""
        return b"".join(self._stderr_tail)[-_STDERR_TAIL_BYTES:]

    async def read_stdout(self, reader: asyncio.StreamReader) -> None:
        """Read to the end."""
        async for pieces in self._read_pieces(reader):
            await self._record_pieces(pieces, self._stdout_stream, self._handle_stdout_piece)

    async def read_stderr(self, reader: asyncio.StreamReader) -> None:
        """Read to the end."""
        async for pieces in self._read_pieces(reader):
            await self._record_pieces(pieces, "stderr", self._append_stderr_tail)

    async def read_terminal(self, chunks: AsyncIterator[bytes], broadcast: Callable[[bytes], None]) -> None:
        """Write down what a terminal shows, as it comes, and show it to those who look on. Nobody listens to it.

        A terminal has no lines: anything inside may write to it, and a page is drawn anew many times.
        """
        async for chunk in chunks:
            self._count_chunk(len(chunk))
            broadcast(chunk)
            await self._record_pieces([(chunk, not chunk.endswith(b"\n"))], "stdout", lambda *_: None)

    async def record_stdout(self, text: bytes) -> None:
        """Write down what stands for stdout where its lines are kept as the transcript only."""
        splitter = LineSplitter()
        await self._record_pieces([*splitter.feed(text), *splitter.flush()], "stdout", lambda *_: None)

    def close(self) -> None:
        """Say how much is missing in the end."""
        if self._quota.dropped_bytes:
            self._record(Gap(0, 0, f"{self._quota.dropped_bytes} bytes of output were left out at last."))

    def _count_chunk(self, byte_count: int) -> None:
        self.processed_bytes += byte_count
        self._on_chunk(byte_count)

    async def _read_pieces(self, reader: asyncio.StreamReader) -> AsyncIterator[Iterable[tuple[bytes, bool]]]:
        splitter = LineSplitter()
        stream = self._redaction.stream() if self._redaction is not None else None
        while (chunk := await _read_chunk(reader, stream)) != b"":
            if chunk is None:
                yield splitter.feed(stream.flush_lines() if stream is not None else b"")
                continue
            await self._queue.wait()
            self._count_chunk(len(chunk))
            yield splitter.feed(chunk if stream is None else stream.feed(chunk))
        if stream is not None:
            yield splitter.feed(stream.flush())
        yield splitter.flush()

    async def _record_pieces(
        self, pieces: Iterable[tuple[bytes, bool]], stream: Stream, on_piece: Callable[[bytes, bool], None]
    ) -> None:
        for number, (piece, continued) in enumerate(pieces):
            if number % _LINES_PER_TURN == 0:
                await asyncio.sleep(0)
                await self._queue.wait()
            if await self._quota.acquire(len(piece)):
                self._record(Output.from_bytes(stream, piece, continued=continued))
            elif not self._has_recorded_gap:
                self._has_recorded_gap = True
                self._record(Gap(0, 0, _OUTPUT_LIMIT_MESSAGE))
            on_piece(piece, continued)
            self.processed_bytes += len(piece)

    def _handle_stdout_piece(self, piece: bytes, continued: bool) -> None:
        """Only whole lines are listened to: the tail of a split one means nothing."""
        line = self._line_joiner.feed(piece, continued)
        if line is not None:
            self._on_line(line)

    def _append_stderr_tail(self, piece: bytes, _: bool) -> None:
        self._stderr_tail.append(piece[-_STDERR_TAIL_BYTES:])
        self._stderr_tail_bytes += len(self._stderr_tail[-1])
        while self._stderr_tail_bytes - len(self._stderr_tail[0]) >= _STDERR_TAIL_BYTES:
            self._stderr_tail_bytes -= len(self._stderr_tail.popleft())


async def _read_chunk(reader: asyncio.StreamReader, stream: StreamRedactor | None) -> bytes | None:
    """A chunk, empty at the end; None when something is held back and nothing has come for a while."""
    if stream is None or not stream.pending_bytes:
        return await reader.read(_CHUNK_BYTES)
    try:
        async with asyncio.timeout(REDACTION_HOLD_SECONDS):
            return await reader.read(_CHUNK_BYTES)
    except TimeoutError:
        return None


async def redacted_chunks(
    reader: asyncio.StreamReader, redaction: Redactor | None, queue: CpuQueue
) -> AsyncIterator[bytes]:
    """What is read without the values of secrets; what may be the beginning of one waits for what follows."""
    stream = redaction.stream() if redaction is not None else None
    while (chunk := await _read_chunk(reader, stream)) != b"":
        await queue.wait()
        if stream is None:
            yield chunk or b""
        elif redacted := stream.flush_lines() if chunk is None else stream.feed(chunk):
            yield redacted
    if stream is not None and (remaining := stream.flush()):
        yield remaining
