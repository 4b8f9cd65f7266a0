r"""Format of a journal line, suitable for grep and jq: `<crc32 of the JSON, 8 hex digits> <JSON>\n`."""

import re
from datetime import UTC, datetime, timedelta
from zlib import crc32

import msgspec

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Progress, Record
from sandbox.model.manifest.schema import decode_manifest, encode_manifest

LINE_BYTES_MAX = 32 * 1024 * 1024
"""Maximum size of a line with its newline. Manifests, results and output lines have far lower limits."""

RECORD_VERSION = 1
"""The newest record format that this program supports."""

_UTC_OFFSET = timedelta(0)
_YEAR_MIN, _YEAR_MAX = 1970, 9000
"""The range of accepted years. Adding an age or a lifetime to such a time, or subtracting it, yields a valid time."""

_CHECKSUM_BYTES = 9
_RECORD_START = re.compile(rb'[0-9a-f]{8} \{"seq":')
_SEQ = re.compile(rb'\{"seq":(\d{1,18}),')
_encoder = msgspec.json.Encoder(enc_hook=encode_manifest)
_decoder = msgspec.json.Decoder(Record, dec_hook=decode_manifest)


def encode(record: Record) -> bytes:
    """Return the line of a record, including its newline."""
    payload = _encoder.encode(record)
    return b"%08x %b\n" % (crc32(payload), payload)


def is_valid(line: bytes) -> bool:
    """Return whether the line ends with its newline and matches its checksum."""
    payload = memoryview(line)[_CHECKSUM_BYTES:-1]
    return line.endswith(b"\n") and line.startswith(b"%08x " % crc32(payload))


def _is_valid_time(at: datetime) -> bool:
    return (at.tzinfo is UTC or at.utcoffset() == _UTC_OFFSET) and _YEAR_MIN <= at.year <= _YEAR_MAX


def has_embedded_record(line: bytes) -> bool:
    """Return whether an invalid line ends with a valid record because the newline before the record was lost.

    The start of a record cannot occur inside another record, because JSON escapes quotes in strings.
    """
    return any(is_valid(line[found.start() :]) for found in _RECORD_START.finditer(line, 1))


def has_seq(line: bytes, seq: int) -> bool:
    """Return whether a valid line has this sequence number.

    Reads only the start of the line, because it is called for every line.
    """
    return line.startswith(b'{"seq":%d,' % seq, _CHECKSUM_BYTES)


def seq_of(line: bytes) -> int:
    """Return the sequence number at the start of a valid line.

    Raises JournalDamagedError if the line has none.
    """
    found = _SEQ.match(line, _CHECKSUM_BYTES)
    if found is None:
        raise JournalDamagedError("A record has no sequence number; a newer version of Sandbox may have written it.")
    return int(found[1])


def decode(line: bytes) -> Record:
    """Decode a valid line. Raises JournalDamagedError if this program does not support the record."""
    try:
        record = _decoder.decode(memoryview(line)[_CHECKSUM_BYTES:-1])
    except DECODE_ERRORS as error:
        raise JournalDamagedError(
            f"A record is malformed ({error}); a newer version of Sandbox may have written it."
        ) from error
    active_at = record.event.last_activity_at if isinstance(record.event, Progress) else None
    if not _is_valid_time(record.at) or (active_at is not None and not _is_valid_time(active_at)):
        raise JournalDamagedError(f"A record is malformed (record {record.seq} has no valid time in UTC).")
    if record.version > RECORD_VERSION:
        raise JournalDamagedError(
            f"Record {record.seq} has version {record.version}; a newer version of Sandbox wrote it."
        )
    return record
