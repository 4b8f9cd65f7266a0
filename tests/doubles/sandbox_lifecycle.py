"""The lifecycle of a sandbox in a test, and the output of its command."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.interfaces.runtime import Command, ExitStatus, Runtime, Sandbox, SandboxSpec

TIMEOUT_SECONDS = 90.0
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class CommandResult:
    code: int | None
    output: str
    errors: str
    was_oom_killed: bool = False


def new_attempt_id() -> str:
    """Return a random id of 12 base32 characters."""
    return base64.b32encode(os.urandom(10)).decode().lower()[:12]


def has_own_kernel(runtime: Runtime) -> bool:
    """Return whether sandboxes of this runtime have their own kernel, which handles their system calls."""
    return runtime.tier != "namespaces"


def sandbox_spec(disk: Path, attempt_id: str, **changes: object) -> SandboxSpec:
    """Return the specification of a small sandbox."""
    defaults: dict[str, object] = {
        "cpus": 2,
        "memory_bytes": 512 * MEBIBYTE,
        "processes_max": 128,
        "git_author": "The Agent",
    }
    return SandboxSpec(attempt_id, disk, **{**defaults, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def ready_sandbox(runtime: Runtime, disk: Path, **changes: object) -> AsyncIterator[Sandbox]:
    """Yield a sandbox in the state `ready`, destroyed after the block."""
    disk.mkdir(exist_ok=True)
    attempt_id = new_attempt_id()
    handle = runtime.prepare(attempt_id)
    try:
        yield await runtime.create(handle, sandbox_spec(disk, attempt_id, **changes))
    finally:
        await runtime.destroy(handle, disk)


async def run_in(
    sandbox: Sandbox,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> CommandResult:
    """Run a command and collect its output."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        variables = {"PATH": "/usr/bin:/bin"} if environment is None else environment
        output, errors = await sandbox.start(Command(argv, variables, "/workspace", stdin))
        stdout, stderr = await asyncio.gather(output.read(), errors.read())
        return decode_result(await sandbox.wait(), stdout, stderr)


def decode_result(exit_status: ExitStatus, output: bytes, errors: bytes) -> CommandResult:
    """Return the result with decoded output."""
    return CommandResult(exit_status.code, output.decode(), errors.decode(), exit_status.was_oom_killed)


async def run_once(
    runtime: Runtime,
    disk: Path,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    **changes: object,
) -> CommandResult:
    """Run one command in a new sandbox."""
    async with ready_sandbox(runtime, disk, **changes) as sandbox:
        return await run_in(sandbox, argv, environment, stdin)


def run_shell(runtime: Runtime, disk: Path, script: str, **changes: object) -> CommandResult:
    """Run a shell script in a new sandbox."""
    return asyncio.run(run_once(runtime, disk, ["/bin/bash", "-c", script], **changes))


def run_python(runtime: Runtime, disk: Path, source: str, **changes: object) -> CommandResult:
    """Run a Python program in a new sandbox, with the image's Python."""
    return asyncio.run(run_once(runtime, disk, ["/usr/bin/python3", "-c", source], **changes))


async def read_until(reader: asyncio.StreamReader, marker: bytes) -> bytes:
    """Read until the output contains the marker; return the output."""
    stdout = b""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while marker not in stdout:
            chunk = await reader.read(65536)
            assert chunk, f"the output ended before {marker!r}: {stdout!r}"
            stdout += chunk
    return stdout
