"""Provision: a sandbox is made for the workspace."""

import secrets
import uuid
from pathlib import Path

import msgspec

from sandbox.contracts.agent import AgentStart
from sandbox.contracts.profiles import HOST_IMAGE
from sandbox.contracts.runtime import HANDLE_VERSION, Sandbox, SandboxHandle, SandboxSpec
from sandbox.model.egress import egress_rules, transparent_ports
from sandbox.model.errors import SandboxError
from sandbox.model.event import SandboxCreated, Trouble
from sandbox.model.limits import SANDBOX_PROCESSES_MAX
from sandbox.runner.durability import give_name
from sandbox.runner.equipment import Attempt
from sandbox.runner.home import write_home


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
