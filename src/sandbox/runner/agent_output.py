"""Agent output: redaction, line splitting, recording and parsing."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from sandbox.interfaces.agent import AgentEvent
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.secrets import Redactor, StreamRedactor
from sandbox.model.events import Event, Gap, Output, Stream
from sandbox.model.fixed_limits import (
    OUTPUT_BURST_BYTES,
    OUTPUT_BYTES_MAX,
    OUTPUT_BYTES_PER_SECOND,
    OUTPUT_LINE_BYTES_MAX,
    PARSED_LINE_BYTES_MAX,
    REDACTION_HOLD_SECONDS,
)
from sandbox.model.task import Task
from sandbox.primitives.runner_cpu_throttle import CpuQueue

_RECORD_OVERHEAD_BYTES = 128
"""Size of a journal record without its text. It counts toward the quota, so a flood of empty lines uses quota too."""


def earlier_output_bytes(task: Task) -> int:
    """Return the output quota that earlier attempts used.

    No counter covers only output records, so all records count toward the quota.
    """
    return task.progress.output_bytes + task.last_seq * _RECORD_OVERHEAD_BYTES


class OutputQuota:
    """Throttles fast output without losing data, and stops recording once a total size is reached.

    dropped_bytes: output that was dropped after the total was reached.
    used_bytes: quota used by earlier attempts.
    """

    def __init__(self, clock: Clock, used_bytes: int = 0) -> None:
        self.dropped_bytes = 0
        self._clock = clock
        self._used_bytes = used_bytes
        self._burst_bytes = float(OUTPUT_BURST_BYTES)
        self._refilled_at = clock.monotonic()

    async def acquire(self, size_bytes: int) -> bool:
        """Wait until a piece of output can be recorded. Returns False if the piece would exceed the total."""
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
    """Splits a stream into `(bytes, is_continued)` pieces. Their concatenation is the original stream."""

    def __init__(self, line_bytes_max: int = OUTPUT_LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bool]]:
        """Yield whole lines, including the newline.

        A line over the limit is split; all parts but the last are continued.
        """
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
        """Yield the rest of a stream that ended without a newline."""
        yield from self._parts(0, len(self._pending))
        self._pending.clear()

    def _parts(self, begin: int, end: int) -> Iterator[tuple[bytes, bool]]:
        while end - begin > self._line_bytes_max:
            yield bytes(self._pending[begin : begin + self._line_bytes_max]), True
            begin += self._line_bytes_max
        if end > begin:
            yield bytes(self._pending[begin:end]), False


class LineJoiner:
    """Joins a splitter's pieces into whole lines. A line is discarded as soon as it exceeds the limit."""

    def __init__(self, line_bytes_max: int = PARSED_LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def feed(self, piece: bytes, is_continued: bool) -> bytes | None:
        """Return the line that this piece completes; None within a line, and at the end of a line over the limit."""
        self._size_bytes += len(piece)
        if self._size_bytes <= self._line_bytes_max:
            self._parts.append(piece)
        else:
            self._parts.clear()
        if is_continued:
            return None
        line = b"".join(self._parts)
        self._parts.clear()
        self._size_bytes = 0
        return line or None


def rendered_output(text: bytes, *, is_parsed: bool) -> Iterator[Output]:
    """Yield the records of a task's rendered stdout. is_parsed: whether conversation events represent the output."""
    splitter = LineSplitter()
    for piece, is_continued in (*splitter.feed(text), *splitter.flush()):
        yield Output.from_bytes("stdout", piece, is_continued=is_continued, is_parsed=is_parsed)


_OUTPUT_LIMIT_MESSAGE = (
    f"Output beyond {OUTPUT_BYTES_MAX // 1024**2} MiB is dropped; have the agent write its output to a file."
)
_CHUNK_BYTES = 64 * 1024
_STDERR_TAIL_BYTES = 8 * 1024
_ITEMS_PER_TURN = 100
"""Number of lines, or of events within a line, that are processed before the next yield to other coroutines."""
_TURN_SECONDS = 0.05
"""Time after which processing yields to other coroutines, even after fewer items: redacting a long string is slow."""
_REDACTED_ON_EVENT_LOOP_BYTES_MAX = 1024
"""Larger pieces are redacted in a thread: 64 KiB of hostile text takes up to 1 s, during which no limit would apply."""


class StdoutProcessing(NamedTuple):
    """How stdout is processed.

    stream: the stream under which its lines are recorded.
    parse_line: parses each whole line, even if the quota drops it from the record; see `OutputParser`.
    on_event: called with each event of a line, after the line was recorded.
    marks_parsed: whether to mark the lines that conversation events already represent.
    """

    stream: Stream
    parse_line: Callable[[bytes], Sequence[AgentEvent] | None]
    on_event: Callable[[AgentEvent], None]
    marks_parsed: bool


class AgentOutput:
    """Processes stdout and stderr. Lines are redacted first, so all later processing uses redacted lines.

    record: records an event.
    on_chunk: called with the size of every chunk.
    cpu_queue: the queue in which output waits for the runner's CPU budget.
    progress_count: grows whenever output is read, recorded or handled. It has no unit; it only shows progress.
    """

    def __init__(
        self,
        record: Callable[[Event], object],
        on_chunk: Callable[[int], None],
        stdout: StdoutProcessing,
        *,
        redactor: Redactor | None,
        quota: OutputQuota,
        cpu_queue: CpuQueue,
    ) -> None:
        self._cpu_queue = cpu_queue
        self.progress_count = 0
        self._quota = quota
        self._record = record
        self._on_chunk = on_chunk
        self._stdout = stdout
        self._redactor = redactor
        self._stderr_tail: deque[bytes] = deque()
        self._stderr_tail_bytes = 0
        self._line_joiner = LineJoiner()
        self._has_recorded_gap = False
        self._yielded_at = 0.0
        """When processing last yielded to other coroutines, by the clock of the event loop."""

    @property
    def stderr_tail(self) -> bytes:
        """The last few kilobytes of stderr."""
        return b"".join(self._stderr_tail)[-_STDERR_TAIL_BYTES:]

    async def read_stdout(self, reader: asyncio.StreamReader) -> None:
        """Read stdout to the end."""
        async for pieces in self._read_pieces(reader):
            for number, (piece, is_continued) in enumerate(pieces):
                await self._pause_regularly(number)
                await self._process_stdout_piece(piece, is_continued)

    async def read_stderr(self, reader: asyncio.StreamReader) -> None:
        """Read stderr to the end."""
        async for pieces in self._read_pieces(reader):
            for number, (piece, is_continued) in enumerate(pieces):
                await self._pause_regularly(number)
                await self._record_piece("stderr", piece, is_continued)
                self._append_stderr_tail(piece)

    async def read_terminal(self, chunks: AsyncIterator[bytes], broadcast: Callable[[bytes], None]) -> None:
        """Record a terminal's output as it arrives and broadcast it to viewers.

        The output is not parsed, because its lines have no meaning: any process inside may write to a terminal, and
        programs redraw the screen.
        """
        async for chunk in chunks:
            self._count_chunk(len(chunk))
            broadcast(chunk)
            await self._pause_regularly(0)
            await self._record_piece("stdout", chunk, not chunk.endswith(b"\n"))

    async def record_rendered_stdout(self, text: bytes) -> None:
        """Record the rendered stdout of a task whose raw stdout is kept only as the transcript."""
        for number, output in enumerate(rendered_output(text, is_parsed=self._stdout.marks_parsed)):
            await self._pause_regularly(number)
            await self._record_piece(output.stream, output.data, output.is_continued, is_parsed=output.is_parsed)

    def close(self) -> None:
        """Record how much output was dropped."""
        if self._quota.dropped_bytes:
            self._record(Gap(0, 0, f"{self._quota.dropped_bytes} bytes of output were dropped at the end."))

    def _count_chunk(self, byte_count: int) -> None:
        self.progress_count += byte_count
        self._on_chunk(byte_count)

    async def _read_pieces(self, reader: asyncio.StreamReader) -> AsyncIterator[Iterable[tuple[bytes, bool]]]:
        splitter = LineSplitter()
        stream = self._redactor.stream() if self._redactor is not None else None
        while (chunk := await _read_chunk(reader, stream)) != b"":
            async with self._cpu_queue:
                if chunk:
                    self._count_chunk(len(chunk))
                redacted = await _redact_chunk(stream, chunk)
            yield splitter.feed(redacted)
        if stream is not None:
            async with self._cpu_queue:
                remaining = await _run_redaction(stream.flush, stream.pending_bytes)
            yield splitter.feed(remaining)
        yield splitter.flush()

    async def _pause_regularly(self, number: int) -> None:
        """Yield to other coroutines, and wait for the CPU budget, after _ITEMS_PER_TURN items or _TURN_SECONDS."""
        loop = asyncio.get_running_loop()
        if number % _ITEMS_PER_TURN == 0 or loop.time() - self._yielded_at > _TURN_SECONDS:
            await asyncio.sleep(0)
            await self._cpu_queue.wait()
            self._yielded_at = loop.time()

    async def _process_stdout_piece(self, piece: bytes, is_continued: bool) -> None:
        """Record a piece.

        If it completes a line, parse the line and handle its events; a partial line has no events.
        """
        line = self._line_joiner.feed(piece, is_continued)
        events = self._stdout.parse_line(line) if line is not None else None
        is_parsed = self._stdout.marks_parsed and events is not None
        await self._record_piece(self._stdout.stream, piece, is_continued, is_parsed=is_parsed)
        for number, event in enumerate(events or (), start=1):
            await self._pause_regularly(number)
            self._stdout.on_event(event)
            self.progress_count += 1

    async def _record_piece(self, stream: Stream, piece: bytes, is_continued: bool, *, is_parsed: bool = False) -> None:
        if await self._quota.acquire(len(piece)):
            self._record(Output.from_bytes(stream, piece, is_continued=is_continued, is_parsed=is_parsed))
        elif not self._has_recorded_gap:
            self._has_recorded_gap = True
            self._record(Gap(0, 0, _OUTPUT_LIMIT_MESSAGE))
        self.progress_count += len(piece)

    def _append_stderr_tail(self, piece: bytes) -> None:
        self._stderr_tail.append(piece[-_STDERR_TAIL_BYTES:])
        self._stderr_tail_bytes += len(self._stderr_tail[-1])
        while self._stderr_tail_bytes - len(self._stderr_tail[0]) >= _STDERR_TAIL_BYTES:
            self._stderr_tail_bytes -= len(self._stderr_tail.popleft())


async def _read_chunk(reader: asyncio.StreamReader, stream: StreamRedactor | None) -> bytes | None:
    """Return a chunk: empty at EOF; None if output is held back and no more came for REDACTION_HOLD_SECONDS."""
    if stream is None or not stream.pending_bytes:
        return await reader.read(_CHUNK_BYTES)
    try:
        async with asyncio.timeout(REDACTION_HOLD_SECONDS):
            return await reader.read(_CHUNK_BYTES)
    except TimeoutError:
        return None


async def redacted_chunks(
    reader: asyncio.StreamReader, redactor: Redactor | None, cpu_queue: CpuQueue
) -> AsyncIterator[bytes]:
    """Yield redacted output.

    Data that may be the start of a secret value is held back. Complete lines are usually held back only briefly.
    """
    stream = redactor.stream() if redactor is not None else None
    while (chunk := await _read_chunk(reader, stream)) != b"":
        async with cpu_queue:
            redacted = await _redact_chunk(stream, chunk)
        if redacted:
            yield redacted
    if stream is not None:
        async with cpu_queue:
            remaining = await _run_redaction(stream.flush, stream.pending_bytes)
        if remaining:
            yield remaining


async def _redact_chunk(stream: StreamRedactor | None, chunk: bytes | None) -> bytes:
    """Return the redacted output that is ready now. chunk: the chunk that was read; None after a pause."""
    if stream is None:
        return chunk or b""
    if chunk is None:
        return await _run_redaction(stream.flush_lines, stream.pending_bytes)
    return await _run_redaction(partial(stream.feed, chunk), len(chunk) + stream.pending_bytes)


async def _run_redaction(redact: Callable[[], bytes], size_bytes: int) -> bytes:
    return redact() if size_bytes <= _REDACTED_ON_EVENT_LOOP_BYTES_MAX else await asyncio.to_thread(redact)
