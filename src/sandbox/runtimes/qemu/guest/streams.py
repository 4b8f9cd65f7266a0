"""Output and input of commands: descriptors that are read for as long as the host accepts data."""

import _socket
import os
import select
from _collections_abc import Callable, Iterator

from . import frames

_CHUNK_BYTES = 32 * 1024


class Streams:
    """The open streams, keyed by number. send: sends a frame."""

    def __init__(self, send: Callable[[bytes, int, bytes], None]) -> None:
        self._send = send
        self._descriptors: dict[int, int] = {}
        self._paused: set[int] = set()
        self._pending_input: dict[int, bytes] = {}

    def add(self, number: int, descriptor: int) -> None:
        """Take ownership of a descriptor."""
        os.set_blocking(descriptor, False)
        self._descriptors[number] = descriptor

    def descriptor(self, number: int) -> int | None:
        """Return the stream's descriptor, or None if the stream is closed."""
        return self._descriptors.get(number)

    def are_complete(self) -> bool:
        """Return whether all streams are closed, except those of terminals whose output the host does not accept.

        The host does not accept a terminal's output while the terminal's client reads nothing. A client may never read.
        """
        return all(number >= frames.FIRST_TERMINAL_STREAM and number in self._paused for number in self._descriptors)

    def pause(self, number: int) -> None:
        """Stop reading the stream."""
        self._paused.add(number)

    def resume(self, number: int) -> None:
        """Resume reading the stream."""
        self._paused.discard(number)

    def write_input(self, number: int, data: bytes) -> None:
        """Write to a terminal. INPUT_WRITTEN is sent once all data is written."""
        if number in self._descriptors:
            self._pending_input[number] = self._pending_input.get(number, b"") + data
        else:
            self._send(frames.INPUT_WRITTEN, number, b"")

    def close(self, number: int) -> None:
        """Close the stream, which hangs up a terminal."""
        self._paused.discard(number)
        descriptor = self._descriptors.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)
            self._send(frames.CLOSED, number, b"")
        if self._pending_input.pop(number, None) is not None:
            self._send(frames.INPUT_WRITTEN, number, b"")

    def poll_events(self, *, can_send: bool) -> Iterator[tuple[int, int]]:
        """Yield descriptors and the events to poll for."""
        for number, descriptor in self._descriptors.items():
            events = select.POLLIN if can_send and number not in self._paused else 0
            events |= select.POLLOUT if number in self._pending_input else 0
            if events:
                yield descriptor, events

    def handle_events(self, descriptor: int, events: int) -> None:
        """Read from and write to the descriptor as far as possible without blocking."""
        number = next((one for one, other in self._descriptors.items() if other == descriptor), None)
        if number is None:
            return
        if events & select.POLLOUT and number in self._pending_input:
            self._write(number, descriptor)
        if events & ~select.POLLOUT and number not in self._paused:
            self._read(number, descriptor)

    def _read(self, number: int, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a terminal that no process has open
            data = b""
        if data:
            self._send(frames.DATA, number, data)
        else:
            self.close(number)

    def _write(self, number: int, descriptor: int) -> None:
        try:
            remaining = self._pending_input[number][os.write(descriptor, self._pending_input[number]) :]
        except BlockingIOError:
            return
        except OSError:
            remaining = b""
        if remaining:
            self._pending_input[number] = remaining
        else:
            del self._pending_input[number]
            self._send(frames.INPUT_WRITTEN, number, b"")


def create_output_pairs() -> tuple[tuple[int, int], tuple[int, int]]:
    """Create the socket pairs for stdout and stderr. The guest agent's end is first in each pair.

    Unlike a pipe, a socket cannot be opened by its path in /proc.
    """
    return _create_pair(), _create_pair()


def _create_pair() -> tuple[int, int]:
    agent_end, child_end = _socket.socketpair()
    return agent_end.detach(), child_end.detach()
