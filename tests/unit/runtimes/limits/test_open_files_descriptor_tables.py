"""Descriptor tables of processes that run or have ended."""

from pathlib import Path

import pytest

from sandbox.runtimes.limits.open_files import descriptor_table_size


def test_descriptor_table_of_an_ended_process_is_empty():
    assert descriptor_table_size("/proc/0") == 0


@pytest.mark.parametrize("name", [b"program", b"\xff\xfe"])
def test_size_of_a_descriptor_table_is_read_regardless_of_the_program_name(tmp_path: Path, name: bytes):
    (tmp_path / "status").write_bytes(b"Name:\t%b\nFDSize:\t256\n" % name)
    assert descriptor_table_size(str(tmp_path)) == 256
