"""The place of every record is found, whatever the journal went through."""

import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import extent
from sandbox.journal.extent import iter_lines
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

AT = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)

sizes = st.lists(st.integers(0, 400) | st.integers(5_000, 20_000), min_size=1, max_size=30)
stretches = st.sampled_from([1, 100, 1000, 64 * 1024])


@contextmanager
def journals_with(line_sizes):
    """One writer after the other for each seven records, as when runners die."""
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
        # What a line holds may look like the beginning of one.
        writer.append(e.Output.from_bytes("stdout", b'00000000 {"seq":1,\n' + b"x" * size), at=AT)
    writer.close()


def assert_all_are_found(journals, records):
    begins = [begin for begin, text in iter_lines(records) if text.endswith(b"\n")]
    told = journals.read("t", bytes_max=1 << 30)
    assert len(told.records) == len(begins)
    for record, begin in zip(told.records, begins, strict=True):
        assert journals.find_offset("t", record.seq) == begin
    for seq in (len(begins) + 1, len(begins) + 2, 2**63):
        assert journals.find_offset("t", seq) == told.next_offset
    assert journals.find_offset("t", 0) == journals.find_offset("t", -1) == 0


# It begins with what each record of a journal that nothing happened to is asked.
@settings(max_examples=40)
@given(sizes, stretches, st.data())
def test_a_journal_that_was_cut_or_replaced_has_no_old_places(line_sizes, stretch, data):
    with mock.patch.object(extent, "LINEAR_SCAN_BYTES_MAX", stretch), journals_with(line_sizes) as (journals, records):
        assert_all_are_found(journals, records)
        whole = records.read_bytes()
        records.write_bytes(whole[: data.draw(st.integers(0, len(whole)), label="cut at")])
        assert_all_are_found(journals, records)
        write(journals, data.draw(sizes, label="written after the cut"))
        assert_all_are_found(journals, records)
        with journals_with(data.draw(sizes, label="replaced by")) as (_, others):
            records.write_bytes(others.read_bytes())
        assert_all_are_found(journals, records)


@given(sizes, stretches, st.binary(max_size=300) | st.integers(0, 5000).map(bytes))
def test_a_torn_tail_hides_nothing(line_sizes, stretch, tail):
    with mock.patch.object(extent, "LINEAR_SCAN_BYTES_MAX", stretch), journals_with(line_sizes) as (journals, records):
        end = records.stat().st_size
        with records.open("ab") as file:
            file.write(tail)
        for seq, (begin, _) in enumerate(list(iter_lines(records))[: len(line_sizes)], 1):
            assert journals.find_offset("t", seq) == begin
        assert journals.find_offset("t", len(line_sizes) + 1) == end


@given(sizes, stretches, st.data())
def test_damage_is_told_or_not_met_and_never_leads_astray(line_sizes, stretch, data):
    with mock.patch.object(extent, "LINEAR_SCAN_BYTES_MAX", stretch), journals_with(line_sizes) as (journals, records):
        begins = [begin for begin, _ in iter_lines(records)]
        whole = bytearray(records.read_bytes())
        position = data.draw(st.integers(0, len(whole) - 1), label="bit flipped in byte")
        whole[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        records.write_bytes(whole)
        for seq, begin in enumerate(begins, 1):
            try:
                found = journals.find_offset("t", seq)
            except JournalDamagedError:
                continue
            # Nothing follows damage in the last record, which looks like a torn tail and is where the journal ends.
            assert found == begin


def test_a_journal_is_not_read_from_its_beginning(monkeypatch):
    with journals_with([200] * 1000) as (journals, records):
        looked_at = []
        monkeypatch.setattr(
            extent, "iter_lines", lambda path, offset: looked_at.append(offset) or iter_lines(path, offset)
        )
        found = journals.find_offset("t", 990)
        assert looked_at[0] > records.stat().st_size - 2 * extent.LINEAR_SCAN_BYTES_MAX
        assert journals.read("t", found).records[0].seq == 990


def test_a_record_without_a_number_is_not_guessed_at():
    with journals_with([10]) as (journals, records):
        from zlib import crc32

        records.write_bytes(b"%08x %b\n" % (crc32(b'{"number":1}'), b'{"number":1}'))
        with pytest.raises(JournalDamagedError, match="newer"):
            journals.find_offset("t", 1)


def test_a_task_without_a_journal_has_no_places(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileJournals(tmp_path).find_offset("t", 1)
