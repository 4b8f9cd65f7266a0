"""Frames between host and guest on the serial port: a kind, a number and a body.

The number identifies a stream: `COMMAND_STREAM`, its `STDOUT_STREAM` and `STDERR_STREAM`, and one stream per terminal,
from `FIRST_TERMINAL_STREAM` on.
"""

import struct

HEADER = struct.Struct("<ccI")
GUEST_FRAME_BYTES_MAX = 64 * 1024
"""Maximum size of the body of a frame from the guest. A longer body is invalid."""

COMMAND_STREAM, STDOUT_STREAM, STDERR_STREAM, FIRST_TERMINAL_STREAM = 0, 1, 2, 3

# From the host.
START, INPUT, RESIZE, HANG_UP, SIGNAL, PAUSE, RESUME, GET_STATS = b"S", b"T", b"Z", b"H", b"K", b"P", b"R", b"A"

# From the guest. EXIT for the command means that no process is left inside and no more output follows.
READY, DATA, CLOSED, INPUT_WRITTEN, EXIT, STATS, FAILED = b"r", b"s", b"c", b"t", b"e", b"f", b"x"

EXIT_BODY = struct.Struct("<i?")
"""Exit code, and whether a process was killed because memory was exhausted."""

STATS_BODY = struct.Struct("<QQQQ")
"""Bytes of memory, processes, OOM kills, failed forks."""

SIZE_BODY = struct.Struct("<HH")
"""Rows and columns."""


def pack(kind: bytes, number: int, body: bytes = b"") -> bytes:
    """Encode one frame."""
    return HEADER.pack(kind, bytes([number]), len(body)) + body


def pack_string_lists(*lists: list[bytes]) -> bytes:
    """Encode lists of strings without NUL. Each list is preceded by its length."""
    return b"".join(b"%d\0" % len(one) + b"".join(word + b"\0" for word in one) for one in lists)


def unpack_three_string_lists(body: bytes) -> tuple[list[list[bytes]], bytes]:
    """Decode three lists encoded by `pack_string_lists`. Returns them and the remaining bytes."""
    lists = []
    for _ in range(3):
        count, _, body = body.partition(b"\0")
        *strings, body = body.split(b"\0", int(count))
        lists.append(strings)
    return lists, body
