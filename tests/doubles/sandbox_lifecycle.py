"""One sandbox's life in a test: planned, created, started, ended; and what a command said on the way."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.interfaces.runtime import Command, ExitStatus, Runtime, Sandbox, SandboxSpec

PATIENCE_SECONDS = 90.0
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Ended:
    """A command's end."""

    code: int | None
    output: str
    errors: str
    was_oom_killed: bool = False


def new_attempt_id() -> str:
    """12 base32 characters."""
    return base64.b32encode(os.urandom(10)).decode().lower()[:12]


def has_own_kernel(runtime: Runtime) -> bool:
    """System calls are not answered by the host: what they may do is that kernel's, and what counts is the host."""
    return runtime.tier != "namespaces"


def describe(disk: Path, attempt_id: str, **changes: object) -> SandboxSpec:
    """A small sandbox."""
    numbers: dict[str, object] = {"cpus": 2, "memory_bytes": 512 * MEBIBYTE, "processes_max": 128}
    return SandboxSpec(attempt_id, disk, **{**numbers, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def living(runtime: Runtime, disk: Path, **changes: object) -> AsyncIterator[Sandbox]:
    """A sandbox in `ready`, destroyed at the end."""
    disk.mkdir(exist_ok=True)
    attempt_id = new_attempt_id()
    handle = runtime.prepare(attempt_id)
    try:
        yield await runtime.create(handle, describe(disk, attempt_id, **changes))
    finally:
        await runtime.destroy(handle, disk)


async def run_in(
    sandbox: Sandbox,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> Ended:
    """Start a command and read it to its end."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        given = {"PATH": "/usr/bin:/bin"} if environment is None else environment
        output, errors = await sandbox.start(Command(argv, given, "/workspace", stdin))
        said, complained = await asyncio.gather(output.read(), errors.read())
        return as_ended(await sandbox.wait(), said, complained)


def as_ended(exit_: ExitStatus, output: bytes, errors: bytes) -> Ended:
    """Bytes as text."""
    return Ended(exit_.code, output.decode(), errors.decode(), exit_.was_oom_killed)


async def run_once(
    runtime: Runtime,
    disk: Path,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    **changes: object,
) -> Ended:
    """A sandbox for one command."""
    async with living(runtime, disk, **changes) as sandbox:
        return await run_in(sandbox, argv, environment, stdin)


def run_story(runtime: Runtime, disk: Path, script: str, **changes: object) -> Ended:
    """A shell script in a sandbox of its own."""
    return asyncio.run(run_once(runtime, disk, ["/bin/bash", "-c", script], **changes))


def run_python(runtime: Runtime, disk: Path, source: str, **changes: object) -> Ended:
    """A Python program in a sandbox of its own, on the image's Python."""
    return asyncio.run(run_once(runtime, disk, ["/usr/bin/python3", "-c", source], **changes))


async def read_until(reader: asyncio.StreamReader, word: bytes) -> bytes:
    """Read until a word was said."""
    said = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while word not in said:
            chunk = await reader.read(65536)
            assert chunk, f"it ended before it said {word!r}: {said!r}"
            said += chunk
    return said
