"""Files are written durably."""

import errno

import pytest

from sandbox.primitives.files import write_durably


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "state.json"
    write_durably(target, b"first")
    write_durably(target, b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sandbox.primitives.files.fsync_path", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_durably(target, b"third")
    assert target.read_bytes() == b"second"
