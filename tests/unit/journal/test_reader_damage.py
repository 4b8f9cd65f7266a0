"""A truncated or corrupted journal never yields wrong records."""

from datetime import UTC, datetime
from zlib import crc32

import pytest

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError, LockState
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
EVENTS = (e.Gap(1, 2, "a"), e.Output.from_bytes("stdout", b"\xff\n"), e.TaskFinished())


@pytest.fixture
def journals(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("t")
    for event in EVENTS:
        writer.append(event, at=TIMESTAMP)
    writer.close()
    return journals


@pytest.fixture
def records(journals, tmp_path):
    return tmp_path / "tasks" / "t" / "journal" / "records"


def line_ends(data):
    return [0] + [position + 1 for position, byte in enumerate(data) if byte == ord("\n")]


def test_truncated_journal_continues_after_its_last_whole_record(journals, records):
    data, expected = records.read_bytes(), list(journals.read("t").records)
    for length in range(len(data) + 1):
        whole = sum(end <= length for end in line_ends(data)) - 1
        records.write_bytes(data[:length])
        assert list(journals.read("t").records) == expected[:whole]
        if not whole:  # the first record was flushed before anything else was written
            with pytest.raises(JournalDamagedError):
                journals.open("t")
            assert records.read_bytes() == data[:length]
            continue

        writer = journals.open("t")
        appended = writer.append(e.TaskFinished(), at=TIMESTAMP)
        writer.close()

        assert appended.seq == whole + 1
        assert list(journals.read("t").records) == [*expected[:whole], appended]


def test_bit_flips_are_detected(journals, records):
    data, expected = records.read_bytes(), list(journals.read("t").records)
    last_begin = line_ends(data)[-2]
    for position in range(len(data)):
        whole = sum(end <= position for end in line_ends(data)) - 1
        for bit in range(8):
            records.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            if position < last_begin:
                with pytest.raises(JournalDamagedError):
                    journals.read("t")
                with pytest.raises(JournalDamagedError):
                    journals.open("t")
                assert journals.lock_state("t") is LockState.FREE
            else:
                assert list(journals.read("t").records) == expected[:whole]
                writer = journals.open("t")
                assert writer.last_seq == whole
                writer.close()


def test_records_before_the_damage_are_readable(journals, records):
    data, expected = records.read_bytes(), journals.read("t").records
    first_end = line_ends(data)[1]
    records.write_bytes(data[: first_end + 20] + b"?" + data[first_end + 21 :])

    assert list(journals.read("t", bytes_max=first_end).records) == [expected[0]]
    with pytest.raises(JournalDamagedError, match=f"byte {first_end} "):
        journals.read("t", first_end)


def test_missing_record_is_detected(journals, records):
    first, _, third = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(first + third)

    with pytest.raises(JournalDamagedError):
        journals.open("t")
    with pytest.raises(JournalDamagedError):
        journals.read("t")


@pytest.mark.parametrize("shift", [-1, 1, 10_000])
def test_offset_inside_a_record_is_an_error(journals, records, shift):
    offset = len(records.read_bytes())

    assert journals.read("t", offset).records == []
    with pytest.raises(JournalOffsetError, match="from its start"):
        journals.read("t", offset + shift)


def test_zeros_after_a_power_loss_are_treated_as_a_torn_tail(journals, records):
    whole = records.read_bytes()
    records.write_bytes(whole + bytes(5 * 1024 * 1024))

    assert len(journals.read("t").records) == len(EVENTS)
    writer = journals.open("t")
    assert (writer.last_seq, records.read_bytes()) == (len(EVENTS), whole)
    writer.close()


def test_record_of_a_newer_version_is_an_error(journals, records):
    from sandbox.journal import record_format

    records.write_bytes(record_format.encode(e.Record(1, 1, TIMESTAMP, e.TaskFinished(), version=2)))

    with pytest.raises(JournalDamagedError, match="newer"):
        journals.read("t")
    with pytest.raises(JournalDamagedError, match="newer"):
        journals.open("t")


def test_task_with_a_damaged_first_record_is_listed(journals, records):
    data = records.read_bytes()
    records.write_bytes(data[:20] + b"?" + data[21:])
    assert journals.task_ids() == ["t"]

    records.write_bytes(data[: line_ends(data)[1] - 5])
    assert journals.task_ids() == []


@pytest.mark.parametrize(
    "event",
    [
        b'{"type":"agent_exited","exit_code":0,"result":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"type":"attempt_started","attempt_id":"../../elsewhere","runtime":"bubblewrap","host":"h"}',
        b'{"type":"attempt_started","attempt_id":"aaaaaaaaaaaa\\n","runtime":"bubblewrap","host":"h"}',
        b'{"type":"artifact_collected","artifact":{"name":"/etc/passwd","path":"p","size_bytes":1,'
        b'"content_type":"text/plain","checksum":"sha256:0"}}',
        b'{"type":"artifact_collected","artifact":{"name":"a","path":"p","size_bytes":1,'
        b'"content_type":"text/plain","checksum":"sha256:0\\r\\nX-Injected: 1"}}',
        b'{"type":"artifact_collected","artifact":{"name":"a","path":"p","size_bytes":1,'
        b'"content_type":"text/plain","checksum":"sha256:0\\n"}}',
        b'{"type":"progress","last_activity_at":"0001-01-01T00:00:00+14:00"}',
        b'{"type":"output","stream":"stdout","text":"\xff"}',
    ],
    ids=[
        "deeply nested",
        "attempt ID with a path",
        "attempt ID with a newline",
        "absolute artifact name",
        "checksum with a header",
        "checksum with a newline",
        "time outside the calendar",
        "invalid UTF-8",
    ],
)
def test_invalid_record_with_a_valid_checksum_is_reported_as_damage(journals, records, event):
    payload = b'{"seq":4,"epoch":1,"at":"2026-01-29T10:10:15Z","event":' + event + b"}"
    records.write_bytes(records.read_bytes() + b"%08x %b\n" % (crc32(payload), payload))
    with pytest.raises(JournalDamagedError, match="is malformed"):
        journals.read("t")


@pytest.mark.parametrize(
    ("at", "is_valid"),
    [
        ("2026-01-29T10:10:15Z", True),
        ("2026-01-29T10:10:15.123456+00:00", True),
        ("2026-01-29T10:10:15", False),
        ("2026-01-29T10:10:15+01:00", False),
        ("0001-01-01T00:00:00+14:00", False),
        ("9999-12-31T23:59:59Z", False),
    ],
)
def test_record_needs_a_time_in_utc(journals, records, at, is_valid):
    """Other times could not be compared with the clock, or would overflow when converted."""
    event = b'{"type":"output","stream":"stdout","text":"a"}'
    payload = b'{"seq":4,"epoch":1,"at":"%b","event":%b}' % (at.encode(), event)
    records.write_bytes(records.read_bytes() + b"%08x %b\n" % (crc32(payload), payload))
    if is_valid:
        assert journals.read("t").records[-1].seq == 4
    else:
        with pytest.raises(JournalDamagedError, match="is malformed"):
            journals.read("t")
