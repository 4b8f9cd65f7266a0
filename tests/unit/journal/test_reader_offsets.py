"""The offset of every record can be found after truncation, replacement and damage."""

import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import reader
from sandbox.journal.journals import FileJournals
from sandbox.journal.reader import iter_lines
from sandbox.model import events as e

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)

sizes = st.lists(st.integers(0, 400) | st.integers(5_000, 20_000), min_size=1, max_size=30)
scan_limits = st.sampled_from([1, 100, 1000, 64 * 1024])


@contextmanager
def journals_with(line_sizes):
    """Create journals with a new writer for every seven records, as after runner crashes."""
    with tempfile.TemporaryDirectory() as directory:
        journals = FileJournals(Path(directory))
        write(journals, line_sizes)
        yield journals, Path(directory) / "tasks" / "t" / "journal" / "records"


def write(journals, line_sizes):
    writer = None
    for number, size in enumerate(line_sizes):
        if number % 7 == 0:
            if writer is not None:
                writer.close()
            writer = journals.open("t") if "t" in journals.task_ids() else journals.create("t")
        # The content of a line may look like the start of another line.
        writer.append(e.Output.from_bytes("stdout", b'00000000 {"seq":1,\n' + b"x" * size), at=TIMESTAMP)
    writer.close()


def assert_all_offsets_are_found(journals, records):
    starts = [start for start, text in iter_lines(records) if text.endswith(b"\n")]
    batch = journals.read("t", bytes_max=1 << 30)
    assert len(batch.records) == len(starts)
    for record, start in zip(batch.records, starts, strict=True):
        assert journals.find_offset("t", record.seq) == start
    for seq in (len(starts) + 1, len(starts) + 2, 2**63):
        assert journals.find_offset("t", seq) == batch.next_offset
    assert journals.find_offset("t", 0) == journals.find_offset("t", -1) == 0


@settings(max_examples=40)
@given(sizes, scan_limits, st.data())
def test_truncated_or_replaced_journal_has_no_stale_offsets(line_sizes, scan_limit, data):
    with (
        mock.patch.object(reader, "LINEAR_SCAN_BYTES_MAX", scan_limit),
        journals_with(line_sizes) as (journals, records),
    ):
        # First, check the unmodified journal.
        assert_all_offsets_are_found(journals, records)
        whole = records.read_bytes()
        records.write_bytes(whole[: data.draw(st.integers(0, len(whole)), label="cut at")])
        assert_all_offsets_are_found(journals, records)
        write(journals, data.draw(sizes, label="written after the cut"))
        assert_all_offsets_are_found(journals, records)
        with journals_with(data.draw(sizes, label="replaced by")) as (_, others):
            records.write_bytes(others.read_bytes())
        assert_all_offsets_are_found(journals, records)


@given(sizes, scan_limits, st.binary(max_size=300) | st.integers(0, 5000).map(bytes))
def test_torn_tail_does_not_hide_records(line_sizes, scan_limit, tail):
    with (
        mock.patch.object(reader, "LINEAR_SCAN_BYTES_MAX", scan_limit),
        journals_with(line_sizes) as (journals, records),
    ):
        end = records.stat().st_size
        with records.open("ab") as file:
            file.write(tail)
        for seq, (start, _) in enumerate(list(iter_lines(records))[: len(line_sizes)], 1):
            assert journals.find_offset("t", seq) == start
        assert journals.find_offset("t", len(line_sizes) + 1) == end


@given(sizes, scan_limits, st.data())
def test_damage_never_yields_a_wrong_offset(line_sizes, scan_limit, data):
    with (
        mock.patch.object(reader, "LINEAR_SCAN_BYTES_MAX", scan_limit),
        journals_with(line_sizes) as (journals, records),
    ):
        starts = [start for start, _ in iter_lines(records)]
        whole = bytearray(records.read_bytes())
        position = data.draw(st.integers(0, len(whole) - 1), label="bit flipped in byte")
        whole[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        records.write_bytes(whole)
        for seq, start in enumerate(starts, 1):
            try:
                offset = journals.find_offset("t", seq)
            except JournalDamagedError:
                continue
            # Damage in the last record looks like a torn tail, so the journal ends there.
            assert offset == start


def test_offset_lookup_does_not_scan_from_the_start(monkeypatch):
    with journals_with([200] * 1000) as (journals, records):
        scanned_from = []
        monkeypatch.setattr(
            reader,
            "iter_lines",
            lambda path, start_offset: scanned_from.append(start_offset) or iter_lines(path, start_offset),
        )
        offset = journals.find_offset("t", 990)
        assert scanned_from[0] > records.stat().st_size - 2 * reader.LINEAR_SCAN_BYTES_MAX
        assert journals.read("t", offset).records[0].seq == 990


def test_record_without_a_seq_is_an_error():
    with journals_with([10]) as (journals, records):
        from zlib import crc32

        records.write_bytes(b"%08x %b\n" % (crc32(b'{"number":1}'), b'{"number":1}'))
        with pytest.raises(JournalDamagedError, match="newer"):
            journals.find_offset("t", 1)


def test_missing_journal_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileJournals(tmp_path).find_offset("t", 1)
