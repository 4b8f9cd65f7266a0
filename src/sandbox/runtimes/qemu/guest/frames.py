"""What host and guest say to each other over the one serial port: a kind, a number and bytes.

The number is a stream's: `COMMAND` with its `OUTPUT` and `ERRORS`, from `TERMINALS` on one for each terminal.
"""

import struct

HEADER = struct.Struct("<ccI")
GUEST_FRAME_BYTES_MAX = 64 * 1024
"""Of a frame from the guest; what is longer is no frame."""

COMMAND, OUTPUT, ERRORS, TERMINALS = 0, 1, 2, 3

# From the host.
START, INPUT, RESIZE, HANG_UP, SIGNAL, PAUSE, RESUME, GET_STATS = b"S", b"T", b"Z", b"H", b"K", b"P", b"R", b"A"

# From the guest. EXIT of the command says that nothing is left inside and nothing more will be said.
READY, DATA, CLOSED, INPUT_WRITTEN, EXIT, STATS, FAILED = b"r", b"s", b"c", b"t", b"e", b"f", b"x"

EXIT_BODY = struct.Struct("<i?")
"""Code, and whether the memory was used up."""

STATS_BODY = struct.Struct("<QQQQ")
"""Bytes of memory, processes, processes ended for want of memory, processes that could not be born."""

SIZE_BODY = struct.Struct("<HH")
"""Rows and columns."""


def pack(kind: bytes, number: int, body: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(kind, bytes([number]), len(body)) + body


def pack_string_lists(*lists: list[bytes]) -> bytes:
    """Lists of words without NUL, each list with the number of its words before it."""
    return b"".join(b"%d\0" % len(one) + b"".join(word + b"\0" for word in one) for one in lists)


def unpack_string_lists(body: bytes) -> tuple[list[list[bytes]], bytes]:
    """Three lists as `pack_words` made them, and the bytes after them."""
    lists = []
    for _ in range(3):
        count, _, body = body.partition(b"\0")
        *strings, body = body.split(b"\0", int(count))
        lists.append(strings)
    return lists, body
