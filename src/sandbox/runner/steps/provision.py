"""Provision: a sandbox is made for the workspace."""

import os
import secrets
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.agent import AgentStart
from sandbox.interfaces.images import HOST_IMAGE
from sandbox.interfaces.runtime import (
    HANDLE_VERSION,
    Confine,
    Confinement,
    ConfinementSpec,
    Sandbox,
    SandboxHandle,
    SandboxSpec,
)
from sandbox.model.egress import egress_rules, transparent_ports
from sandbox.model.errors import SandboxError
from sandbox.model.events import SandboxCreated, Trouble
from sandbox.model.limits import SANDBOX_PROCESSES_MAX
from sandbox.runner.dependencies import Attempt
from sandbox.system.files import give_name, open_unlocked

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_home(home: Path, files: Mapping[str, bytes]) -> None:
    """Put files there by their relative paths, in place of what has the name. No link is followed. Raises OSError."""
    for name, content in files.items():
        *directories, last = PurePosixPath(name).parts
        here = _open(home)
        try:
            for directory in directories:
                here = _enter(here, directory)
            _replace(here, last, content)
        finally:
            os.close(here)


def _enter(here: int, name: str) -> int:
    """Into the directory of this name, made where there is none."""
    try:
        there = _open(name, here)
    except OSError:
        _unlink(here, name)
        os.mkdir(name, mode=0o700, dir_fd=here)
        there = _open(name, here)
    os.close(here)
    return there


def _open(name: str | Path, here: int | None = None) -> int:
    return open_unlocked(name, _DIRECTORY, here, rights=os.W_OK | os.X_OK)


def _replace(here: int, name: str, content: bytes) -> None:
    _unlink(here, name)
    with os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=here), "wb") as file:
        file.write(content)


def _unlink(here: int, name: str) -> None:
    """A directory is moved aside: emptying one that an agent filled may take without end."""
    try:
        os.unlink(name, dir_fd=here)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        os.rename(name, f"{name}.aside-{secrets.token_hex(4)}", src_dir_fd=here, dst_dir_fd=here)


class HandleTooNewError(SandboxError):
    """The sandbox was made by a newer program, which alone knows how to end it."""

    code = "handle_too_new"


class Provisioned(msgspec.Struct, frozen=True):
    """A sandbox that answers, and what will run in it."""

    sandbox: Sandbox
    start: AgentStart
    task_key: str


async def provision(attempt: Attempt) -> Provisioned:
    """Write the handle down, then make what it names. Raises AttemptError (provision_failed)."""
    runtime, image = attempt.equipment.runtime, attempt.image
    if image is not None:
        attempt.equipment.images.hold(image)
    manifest = attempt.task.manifest
    task_key = f"sk-ant-sandbox-{secrets.token_urlsafe(32)}"
    start = attempt.equipment.agent.prepare(
        manifest,
        session_id=_session_id(attempt),
        task_key=task_key,
        secrets=attempt.secrets,
        resumes=attempt.resumes,
    )
    write_home(attempt.files.home, start.home_files)
    handle = plan(attempt)
    spec = SandboxSpec(
        attempt_id=attempt.id,
        disk=attempt.files.disk,
        cpus=manifest.vm.cpus,
        memory_bytes=manifest.vm.memory_bytes,
        processes_max=SANDBOX_PROCESSES_MAX,
        programs=start.programs,
        image=None if image is None else Path(image.directory),
        transparent_ports=transparent_ports(egress_rules(manifest.vm)),
        disk_was_used=attempt.resumes,
    )
    sandbox = await runtime.create(handle, spec)
    attempt.recorder.record(
        SandboxCreated(vm_name=attempt.id, tier=runtime.tier, image=HOST_IMAGE if image is None else image.name)
    )
    if sandbox.slow_because is not None:
        attempt.recorder.record(Trouble("sandbox_slow", sandbox.slow_because))
    return Provisioned(sandbox, start, task_key)


def plan(attempt: Attempt) -> SandboxHandle:
    """The handle of what will be made, on disk before anything of it is. Raises AttemptError (provision_failed)."""
    handle = attempt.equipment.runtime.plan(attempt.id)
    if read_handle(attempt.files.handle) != handle:
        write_handle(attempt.files.handle, handle)
    return handle


def write_handle(path: Path, handle: SandboxHandle) -> None:
    """Put the handle on disk, whole and flushed."""
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(handle))
    give_name(part, path)


def read_handle(path: Path) -> SandboxHandle | None:
    """The handle that an attempt wrote down; None when it never came to that. Raises HandleTooNewError."""
    try:
        handle = msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except FileNotFoundError:
        return None
    if handle.version > HANDLE_VERSION:
        raise HandleTooNewError(f"{path} has version {handle.version}; end this sandbox with a newer Sandbox.")
    return handle


def _session_id(attempt: Attempt) -> str:
    """A new one, or the one that is gone on with."""
    if not attempt.resumes:
        return str(uuid.uuid4())
    return next(one.session_id for one in reversed(attempt.task.past_attempts) if one.session_id is not None)


def confine_for(attempt: Attempt) -> Confine:
    """Makes confinements for the attempt, the handle on disk before anything of them is there."""
    if attempt.equipment.confine is not None:
        return attempt.equipment.confine
    vm = attempt.task.manifest.vm

    @asynccontextmanager
    async def confine(directories: Sequence[Path], read_only: Sequence[Path]) -> AsyncIterator[Confinement]:
        handle = plan(attempt)
        spec = ConfinementSpec(vm.cpus, vm.memory_bytes, SANDBOX_PROCESSES_MAX, directories, read_only)
        async with attempt.equipment.runtime.confine(handle, spec) as confinement:
            yield confinement

    return confine
