"""A record as a line of the journal: `<crc32 of the JSON, 8 hex digits> <JSON>\\n`, made for grep and jq."""

import re
from zlib import crc32

import msgspec

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Record

LINE_BYTES_MAX = 32 * 1024 * 1024
"""A line with its newline. A manifest, a result and a line of output have bounds far below it, escapes included."""

RECORD_VERSION = 1
"""The newest shape of records that this program knows."""

_CHECKSUM_BYTES = 9
_RECORD_START = re.compile(rb'[0-9a-f]{8} \{"seq":')
_SEQ = re.compile(rb'\{"seq":(\d{1,18}),')
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """The line of a record, its newline included."""
    payload = _encoder.encode(record)
    return b"%08x %b\n" % (crc32(payload), payload)


def is_complete(text: bytes) -> bool:
    """The line ends with its newline and matches its checksum, to the bit."""
    payload = memoryview(text)[_CHECKSUM_BYTES:-1]
    return text.endswith(b"\n") and text.startswith(b"%08x " % crc32(payload))


def has_embedded_record(text: bytes) -> bool:
    """A line that is not whole ends with a record that is: the newline before it was lost.

    Inside a record the pattern cannot occur, because JSON escapes the quotes of a string.
    """
    return any(is_complete(text[found.start() :]) for found in _RECORD_START.finditer(text, 1))


def has_seq(text: bytes, seq: int) -> bool:
    """A whole line carries this number; looks at its beginning only, because every line of a journal is asked."""
    return text.startswith(b'{"seq":%d,' % seq, _CHECKSUM_BYTES)


def seq_of(text: bytes) -> int:
    """The number that a whole line carries, by a look at its beginning.

    Raises JournalDamagedError when it has none.
    """
    found = _SEQ.match(text, _CHECKSUM_BYTES)
    if found is None:
        raise JournalDamagedError("A record has no number where it should; is it of a newer Sandbox?")
    return int(found[1])


def decode(text: bytes) -> Record:
    """The record of a whole line. Raises JournalDamagedError when it is none that this program knows."""
    try:
        record = _decoder.decode(memoryview(text)[_CHECKSUM_BYTES:-1])
    except DECODE_ERRORS as error:
        raise JournalDamagedError(f"A record cannot be understood ({error}); is it of a newer Sandbox?") from error
    if record.version > RECORD_VERSION:
        raise JournalDamagedError(f"Record {record.seq} has version {record.version}; read it with a newer Sandbox.")
    return record
