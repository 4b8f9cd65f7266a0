"""A compressed journal of a finished task is smaller than the plain journal and contains the same records."""

import os
import random
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, JournalOffsetError, LockState
from sandbox.journal import compressed as compressed_module
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
MEMBER_BYTES = 2000


@pytest.fixture(autouse=True)
def small_members(monkeypatch):
    monkeypatch.setattr(compressed_module, "MEMBER_BYTES", MEMBER_BYTES)


@pytest.fixture
def journals(tmp_path):
    """A journal that is compressed into many members. One line is longer than a member."""
    journals, rng = FileJournals(tmp_path), random.Random(7)
    writer = journals.create("t")
    for number in range(150):
        length = 3 * MEMBER_BYTES if number == 60 else rng.randrange(200)
        writer.append(e.Output.from_bytes("stdout", rng.randbytes(length // 2).hex().encode() + b"\n"), at=TIMESTAMP)
    writer.append(e.TaskFinished(), at=TIMESTAMP)
    writer.close()
    return journals


@pytest.fixture
def directory(journals, tmp_path):
    return tmp_path / "tasks" / "t" / "journal"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def read_all(journals, bytes_max=1 << 20, offset=0):
    records = []
    while (batch := journals.read("t", offset, bytes_max=bytes_max)).records:
        records += batch.records
        offset = batch.next_offset
    return records, offset


def test_compressed_journal_has_the_records_and_offsets_of_the_plain_journal(journals, directory):
    data = (directory / "records").read_bytes()
    expected, size = read_all(journals)
    offsets = [journals.find_offset("t", seq) for seq in range(155)]
    limited = [journals.read("t", offset, bytes_max=500).records[0] for offset in offsets[1:-4]]

    journals.compress("t")

    assert names(directory) == ["lock", "records.gz"]
    assert (directory / "records.gz").stat().st_mode & 0o777 == 0o600
    assert read_all(journals) == read_all(journals, 500) == read_all(journals, 1) == (expected, size)
    assert [journals.find_offset("t", seq) for seq in range(155)] == offsets
    assert [journals.read("t", offset, bytes_max=500).records[0] for offset in offsets[1:-4]] == limited
    assert (journals.size_bytes("t"), journals.task_ids()) == (len(data), ["t"])
    decompressed = subprocess.run(
        ["gzip", "-dc", directory / "records.gz"], capture_output=True, timeout=10, check=True
    )
    assert (decompressed.stdout, decompressed.stderr) == (data, b"")


def test_batch_ends_at_the_byte_limit(journals):
    journals.compress("t")
    for seq in (1, 30, 61, 150):
        begin, end = journals.find_offset("t", seq), journals.find_offset("t", seq + 1)
        batch = journals.read("t", begin, bytes_max=end - begin)
        assert ([record.seq for record in batch.records], batch.next_offset) == ([seq], end)


@pytest.mark.parametrize("shift", [-1, 1, 10_000])
def test_offset_inside_a_record_is_an_error(journals, shift):
    journals.compress("t")
    with pytest.raises(JournalOffsetError, match="from its start"):
        journals.read("t", journals.size_bytes("t") + shift)


def test_bit_flips_and_truncation_are_detected(journals, directory):
    journals.compress("t")
    file = directory / "records.gz"
    data, expected = file.read_bytes(), read_all(journals)
    rng, damage_count = random.Random(8), 0
    positions = [*range(80), *(rng.randrange(len(data)) for _ in range(200))]
    for position in positions:
        replace(file, data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        try:
            # A change to the padding bits of a member's last byte has no effect.
            assert read_all(journals) == expected
        except JournalDamagedError:
            damage_count += 1
    assert damage_count > 0.9 * len(positions)
    for length in [*range(1, 80), *(rng.randrange(1, len(data)) for _ in range(60))]:
        replace(file, data[:length])
        try:
            records, _ = read_all(journals)
        except JournalDamagedError:
            continue
        # A journal that is truncated between two members is valid, but it ends before the offset in the index.
        assert records == expected[0][: len(records)]
        with pytest.raises(JournalDamagedError):
            journals.read("t", expected[1])


def replace(file, data):
    """Replace the file and clear the cache. The mtime in the cache key is too coarse to detect the change."""
    file.write_bytes(data)
    compressed_module._read_members.cache_clear()


def unlink_that_crashes_for(name, crash):
    original = Path.unlink
    return lambda path, **options: crash() if path.name == name else original(path, **options)


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "unlink"])
def test_crash_at_any_step_is_recoverable(journals, directory, monkeypatch, step):
    expected = read_all(journals)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(compressed_module, "_encode_member", crash)
        elif step == "fsync":
            patch.setattr(os, "fsync", crash)
        else:
            patch.setattr(
                f"pathlib.Path.{step}", crash if step == "rename" else unlink_that_crashes_for("records", crash)
            )
        with pytest.raises(KeyboardInterrupt):
            journals.compress("t")
    assert read_all(journals) == expected
    assert journals.task_ids() == ["t"]

    journals.compress("t")
    journals.compress("t")
    assert read_all(journals) == expected
    assert names(directory) == ["lock", "records.gz"]


def test_torn_tail_is_omitted(journals, directory):
    expected = read_all(journals)
    with (directory / "records").open("ab") as records:
        records.write(b"torn")
    journals.compress("t")
    assert read_all(journals) == expected


def test_damaged_or_busy_journal_is_not_compressed(journals, directory):
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


def test_journal_without_its_last_record_is_not_compressed_and_remains_writable(journals, directory):
    """This happens if an old journal was restored or if the disk lost the last records.

    Clients may already have received those records.
    """
    lines = (directory / "records").read_bytes().splitlines(keepends=True)
    for remaining in (lines[:-1], []):
        (directory / "records").write_bytes(b"".join(remaining))
        with pytest.raises(JournalDamagedError, match="rebuild"):
            journals.compress("t")
        assert names(directory) == ["lock", "records"]
    (directory / "records").write_bytes(b"".join(lines[:-1]))
    writer = journals.open("t")
    writer.append(e.TaskFinished(), at=TIMESTAMP)
    writer.close()
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_compressed_journal_cannot_be_reopened(journals, directory):
    journals.compress("t")
    with pytest.raises(FileExistsError):
        journals.create("t")
    with pytest.raises(FileNotFoundError):
        journals.open("t")
    assert names(directory) == ["lock", "records.gz"]
    assert journals.lock_state("t") is LockState.FREE
