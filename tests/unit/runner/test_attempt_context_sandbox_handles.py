"""The sandbox handle of an attempt can be read by the version that wrote it and by later versions."""

import msgspec
import pytest

from sandbox.interfaces.runtime import HANDLE_VERSION, SandboxHandle
from sandbox.runner.attempt_context import HandleTooNewError, read_handle, write_handle

VERSION_1_HANDLE = b'{"runtime":"bubblewrap","attempt_id":"a","details":{"kernel_uid":"200000"}}'


def test_handle_round_trips(tmp_path):
    path, handle = tmp_path / "handle.json", SandboxHandle("bubblewrap", "a", {"kernel_uid": "7"})
    assert read_handle(path) is None
    write_handle(path, handle)
    assert read_handle(path) == handle
    path.write_bytes(VERSION_1_HANDLE)
    assert read_handle(path) == SandboxHandle("bubblewrap", "a", {"kernel_uid": "200000"}, version=1)


def test_handle_of_a_newer_version_is_rejected(tmp_path):
    path = tmp_path / "handle.json"
    path.write_bytes(msgspec.json.encode(SandboxHandle("bubblewrap", "a", version=HANDLE_VERSION + 1)))
    with pytest.raises(HandleTooNewError, match="newer"):
        read_handle(path)
