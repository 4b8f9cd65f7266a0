"""A finished task's journal takes less room when it is packed, and tells the same to everybody who asks."""

import os
import random
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, JournalOffsetError
from sandbox.journal import compressed as packed_module
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

AT = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
PIECE_BYTES = 2000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(packed_module, "MEMBER_BYTES", PIECE_BYTES)


@pytest.fixture
def journals(tmp_path):
    """A journal of many pieces, one of them a line that is longer than a piece."""
    journals, chance = FileJournals(tmp_path), random.Random(7)
    writer = journals.create("t")
    for number in range(150):
        length = 3 * PIECE_BYTES if number == 60 else chance.randrange(200)
        writer.append(e.Output.from_bytes("stdout", chance.randbytes(length // 2).hex().encode() + b"\n"), at=AT)
    writer.append(e.TaskFinished(), at=AT)
    writer.close()
    return journals


@pytest.fixture
def directory(journals, tmp_path):
    return tmp_path / "tasks" / "t" / "journal"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def everything(journals, bytes_max=1 << 20, offset=0):
    records = []
    while (batch := journals.read("t", offset, bytes_max=bytes_max)).records:
        records += batch.records
        offset = batch.next_offset
    return records, offset


def test_what_is_read_and_found_is_the_same(journals, directory):
    data = (directory / "records").read_bytes()
    told, size = everything(journals)
    places = [journals.find_offset("t", seq) for seq in range(155)]
    narrow = [journals.read("t", offset, bytes_max=500).records[0] for offset in places[1:-4]]

    journals.compress("t")

    assert names(directory) == ["lock", "records.gz"]
    assert (directory / "records.gz").stat().st_mode & 0o777 == 0o600
    assert everything(journals) == everything(journals, 500) == everything(journals, 1) == (told, size)
    assert [journals.find_offset("t", seq) for seq in range(155)] == places
    assert [journals.read("t", offset, bytes_max=500).records[0] for offset in places[1:-4]] == narrow
    assert (journals.size_bytes("t"), journals.task_ids()) == (len(data), ["t"])
    unpacked = subprocess.run(["gzip", "-dc", directory / "records.gz"], capture_output=True, timeout=10, check=True)
    assert (unpacked.stdout, unpacked.stderr) == (data, b"")


def test_a_batch_ends_where_it_is_told_to(journals):
    journals.compress("t")
    for seq in (1, 30, 61, 150):
        begin, end = journals.find_offset("t", seq), journals.find_offset("t", seq + 1)
        batch = journals.read("t", begin, bytes_max=end - begin)
        assert ([record.seq for record in batch.records], batch.next_offset) == ([seq], end)


@pytest.mark.parametrize("shift", [-1, 1, 10_000])
def test_an_offset_that_no_record_ends_at_is_told(journals, shift):
    journals.compress("t")
    with pytest.raises(JournalOffsetError, match="from the beginning"):
        journals.read("t", journals.size_bytes("t") + shift)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(journals, directory):
    journals.compress("t")
    file = directory / "records.gz"
    data, told = file.read_bytes(), everything(journals)
    chance, told_damaged = random.Random(8), 0
    positions = [*range(80), *(chance.randrange(len(data)) for _ in range(200))]
    for position in positions:
        replace(file, data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :])
        try:
            # The bits that fill a member's last byte mean nothing.
            assert everything(journals) == told
        except JournalDamagedError:
            told_damaged += 1
    assert told_damaged > 0.9 * len(positions)
    for length in [*range(1, 80), *(chance.randrange(1, len(data)) for _ in range(60))]:
        replace(file, data[:length])
        try:
            records, _ = everything(journals)
        except JournalDamagedError:
            continue
        # Cut between two members: a whole journal, and shorter than what the index knows.
        assert records == told[0][: len(records)]
        with pytest.raises(JournalDamagedError):
            journals.read("t", told[1])


def replace(file, data):
    """Faster than the clock of a file system goes, by which a file is told from its successor."""
    file.write_bytes(data)
    packed_module._read_members.cache_clear()


def unlink_but(name, crash):
    real = Path.unlink
    return lambda path, **options: crash() if path.name == name else real(path, **options)


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "unlink"])
def test_a_crash_at_any_step_leaves_a_whole_journal_and_the_next_try_succeeds(journals, directory, monkeypatch, step):
    told = everything(journals)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        if step == "write":
            broken.setattr(packed_module, "_encode_member", crash)
        elif step == "fsync":
            broken.setattr(os, "fsync", crash)
        else:
            broken.setattr(f"pathlib.Path.{step}", crash if step == "rename" else unlink_but("records", crash))
        with pytest.raises(KeyboardInterrupt):
            journals.compress("t")
    assert everything(journals) == told
    assert journals.task_ids() == ["t"]

    journals.compress("t")
    journals.compress("t")
    assert everything(journals) == told
    assert names(directory) == ["lock", "records.gz"]


def test_a_torn_tail_is_left_out(journals, directory):
    told = everything(journals)
    with (directory / "records").open("ab") as records:
        records.write(b"torn")
    journals.compress("t")
    assert everything(journals) == told


def test_a_damaged_journal_and_one_that_is_written_are_not_packed(journals, directory):
    writer = journals.open("t")
    with pytest.raises(JournalBusyError):
        journals.compress("t")
    writer.close()
    data = bytearray((directory / "records").read_bytes())
    data[1000] ^= 1
    (directory / "records").write_bytes(data)
    with pytest.raises(JournalDamagedError):
        journals.compress("t")
    assert names(directory) == ["lock", "records"]
    with pytest.raises(FileNotFoundError):
        journals.compress("other")


def test_a_journal_that_tells_of_no_end_is_not_packed_and_goes_on(journals, directory):
    """Whoever asks may have heard of an end: somebody put an older journal back, or a disk lost the last records."""
    whole = (directory / "records").read_bytes().splitlines(keepends=True)
    for kept in (whole[:-1], []):
        (directory / "records").write_bytes(b"".join(kept))
        with pytest.raises(JournalDamagedError, match="rebuild"):
            journals.compress("t")
        assert names(directory) == ["lock", "records"]
    (directory / "records").write_bytes(b"".join(whole[:-1]))
    writer = journals.open("t")
    writer.append(e.TaskFinished(), at=AT)
    writer.close()
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_a_packed_journal_is_never_begun_again(journals, directory):
    journals.compress("t")
    with pytest.raises(FileExistsError):
        journals.create("t")
    with pytest.raises(FileNotFoundError):
        journals.open("t")
    assert names(directory) == ["lock", "records.gz"]
    assert not journals.is_locked("t")
