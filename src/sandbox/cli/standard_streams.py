"""Standard streams that are always open and never raise an encoding error."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


STDOUT = "stdout"


class _Stdout(io.BufferedWriter):
    """Standard output. Its write errors have STDOUT as their file name."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            error.filename = STDOUT
            raise


class _Stderr(io.BufferedWriter):
    """Standard error that ignores write errors, so that they neither end a command nor change its exit code."""

    def write(self, data: ReadableBuffer, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def set_up_streams() -> None:
    """Reopen closed standard streams, and configure the handling of encoding errors and write errors."""
    _open_closed_streams()
    sys.stdout = _wrap_stream(sys.stdout, _Stdout)
    sys.stderr = _wrap_stream(sys.stderr, _Stderr)


def discard_stdout() -> None:
    """Discard buffered output; otherwise the interpreter prints an error when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wrap_stream(stream: IO[str], kind: type[io.BufferedWriter]) -> IO[str]:
    """Return a stream that escapes characters missing from its encoding instead of raising an error."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, is_line_buffered = stream.encoding, stream.line_buffering
    buffer: Any = stream.detach()
    raw: io.RawIOBase = buffer.detach() if isinstance(buffer, io.BufferedWriter) else buffer
    return io.TextIOWrapper(kind(raw), encoding, "backslashreplace", line_buffering=is_line_buffered)


def _open_closed_streams() -> None:
    """Open /dev/null in place of closed standard streams, for this process and its children."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is the closed one
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
