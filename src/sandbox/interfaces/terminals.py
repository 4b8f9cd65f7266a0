"""A terminal in a sandbox as its runner gives it to clients: frames both ways, after one order and its receipt."""

import struct
from asyncio import IncompleteReadError, StreamReader
from typing import Protocol, TypeVar

import msgspec

from sandbox.model.errors import SandboxError

FRAME_BYTES_MAX = 256 * 1024
_LENGTH = struct.Struct(">I")

T = TypeVar("T")


class OutputFrame(msgspec.Struct, frozen=True, tag="shown"):
    """What the terminal shows."""

    data: bytes


class RoleFrame(msgspec.Struct, frozen=True, tag="role"):
    """Whether what this client types is taken from now on; one client types, all others look on."""

    types: bool


class EndFrame(msgspec.Struct, frozen=True, tag="ended"):
    """Nothing comes after this. exit_code: of the terminal's process, None when it goes on or was never learnt.

    message: for people, why it is over where that is not its process's own end.
    """

    exit_code: int | None = None
    message: str = ""


class InputFrame(msgspec.Struct, frozen=True, tag="typed"):
    """What a client types."""

    data: bytes


class ResizeFrame(msgspec.Struct, frozen=True, tag="resized"):
    """The size of a client's window, each 1 to 1000 characters."""

    rows: int
    columns: int


RunnerFrame = OutputFrame | RoleFrame | EndFrame
ClientFrame = InputFrame | ResizeFrame


class TerminalRefusedError(SandboxError):
    """The task has no such terminal at the moment. The message says what to do."""

    code = "no_terminal"


class TerminalConnection(Protocol):
    """One client's connection to a terminal."""

    async def read(self) -> RunnerFrame:
        """What comes next; `Ended` when it is over, also when the runner is gone."""
        ...

    async def send(self, frame: ClientFrame) -> None:
        """Type or resize; waits while the runner does not take more. Nothing happens once it is over."""
        ...

    async def close(self) -> None:
        """Leave. A shell ends with it; the agent's terminal goes on."""
        ...


def encode_frame(frame: RunnerFrame | ClientFrame) -> bytes:
    """A frame as it goes over the socket."""
    body = msgspec.msgpack.encode(frame)
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: StreamReader, decoder: "msgspec.msgpack.Decoder[T]") -> T | None:
    """The next frame, None at the end. Raises ValueError for what is none, OSError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > FRAME_BYTES_MAX:
            raise ValueError("a frame is too large")
        return decoder.decode(await reader.readexactly(length))
    except IncompleteReadError:
        return None
