"""Terminal protocol between a runner and its clients: frames in both directions, after one request and its reply."""

import struct
from asyncio import IncompleteReadError, StreamReader
from typing import Protocol, TypeVar

import msgspec

from sandbox.model.errors import SandboxError

FRAME_BYTES_MAX = 256 * 1024
_LENGTH = struct.Struct(">I")

T = TypeVar("T")


class OutputFrame(msgspec.Struct, frozen=True, tag="shown"):
    """Output of the terminal."""

    data: bytes


class WriteAccessFrame(msgspec.Struct, frozen=True, tag="role", rename={"may_write": "types"}):
    """States whether input from this client is accepted from now on. Only one client at a time may write."""

    may_write: bool


class EndFrame(msgspec.Struct, frozen=True, tag="ended"):
    """The last frame.

    exit_code: exit code of the terminal's process; None if the process is still running or its exit code is unknown.
    message: why the connection ended (human-readable), if it ended for a reason other than the exit of the process.
    """

    exit_code: int | None = None
    message: str = ""


class InputFrame(msgspec.Struct, frozen=True, tag="typed"):
    """Input from a client."""

    data: bytes


class ResizeFrame(msgspec.Struct, frozen=True, tag="resized"):
    """The width and height of a client's window, each 1 to 1000 characters."""

    rows: int
    columns: int


RunnerFrame = OutputFrame | WriteAccessFrame | EndFrame
ClientFrame = InputFrame | ResizeFrame


class TerminalRefusedError(SandboxError):
    """The requested terminal is not available now. The message says what to do."""

    code = "no_terminal"


class TerminalConnection(Protocol):
    """One client's connection to a terminal."""

    async def read(self) -> RunnerFrame:
        """Return the next frame; `EndFrame` at the end, even if the runner is gone."""
        ...

    async def send(self, frame: ClientFrame) -> None:
        """Send input or a window size. Waits until the runner accepts the data; does nothing on a closed connection."""
        ...

    async def close(self) -> None:
        """Disconnect. A shell ends with its connection; the agent's terminal continues."""
        ...


def encode_frame(frame: RunnerFrame | ClientFrame) -> bytes:
    """Encode a frame for the socket."""
    body = msgspec.msgpack.encode(frame)
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: StreamReader, decoder: "msgspec.msgpack.Decoder[T]") -> T | None:
    """Return the next frame, or None at the end. Raises OSError, or ValueError if the data is invalid."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > FRAME_BYTES_MAX:
            raise ValueError("a frame is too large")
        return decoder.decode(await reader.readexactly(length))
    except IncompleteReadError:
        return None
