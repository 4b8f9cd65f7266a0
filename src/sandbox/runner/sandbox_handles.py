"""Reads and stores the handle of an attempt's sandbox, which is on disk before the sandbox exists."""

from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import HANDLE_VERSION, Runtime, SandboxHandle
from sandbox.model.errors import SandboxError
from sandbox.primitives.durable_files import write_durably
from sandbox.runner.attempt_context import AttemptContext


class HandleTooNewError(SandboxError):
    """The sandbox was created by a newer version, and only that version can destroy it."""

    code = "handle_too_new"


def prepare_handle(attempt: AttemptContext, runtime: Runtime) -> SandboxHandle:
    """Create the sandbox's handle and store it before the sandbox exists. Raises AttemptError (provision_failed)."""
    handle = runtime.prepare(attempt.id)
    if read_handle(attempt.layout.handle) != handle:
        write_handle(attempt.layout.handle, handle)
    return handle


def write_handle(path: Path, handle: SandboxHandle) -> None:
    """Write the handle to disk atomically and durably."""
    write_durably(path, msgspec.json.encode(handle))


def read_handle(path: Path) -> SandboxHandle | None:
    """Return the handle that an attempt stored, or None if it stored none. Raises HandleTooNewError."""
    try:
        handle = msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except FileNotFoundError:
        return None
    if handle.version > HANDLE_VERSION:
        raise HandleTooNewError(f"{path} has version {handle.version}; remove it with a newer version of Sandbox.")
    return handle
