"""Provision step: creates the sandbox."""

import errno
import os
import secrets
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.agent import AgentDriver, AgentLaunchSpec
from sandbox.interfaces.images import HOST_IMAGE, ImageLocks
from sandbox.interfaces.runtime import Confine, Confinement, ConfinementSpec, Runtime, Sandbox, SandboxSpec
from sandbox.model.egress import egress_rules, transparent_ports
from sandbox.model.events import ErrorReported, SandboxCreated
from sandbox.model.fixed_limits import SANDBOX_PROCESSES_MAX
from sandbox.primitives.files import open_granting_access
from sandbox.runner.attempt_context import AttemptContext, prepare_handle
from sandbox.runner.parent_task_results import manifest_with_earlier_conversation, read_inherited_session

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_home_files(home: Path, files: Mapping[str, bytes]) -> None:
    """Write files to their relative paths, replacing existing entries. No link is followed. Raises OSError."""
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise OSError(errno.EINVAL, "A file is outside the home directory", name)
        *directories, last = path.parts
        directory_fd = _open_directory(home)
        try:
            for directory in directories:
                directory_fd = _open_or_make_directory(directory_fd, directory)
            _replace_file(directory_fd, last, content)
        finally:
            os.close(directory_fd)


def _open_or_make_directory(directory_fd: int, name: str) -> int:
    try:
        child_fd = _open_directory(name, directory_fd)
    except OSError:
        _remove_entry(directory_fd, name)
        os.mkdir(name, mode=0o700, dir_fd=directory_fd)
        child_fd = _open_directory(name, directory_fd)
    os.close(directory_fd)
    return child_fd


def _open_directory(name: str | Path, directory_fd: int | None = None) -> int:
    return open_granting_access(name, _DIRECTORY_FLAGS, directory_fd, access_mode=os.W_OK | os.X_OK)


def _replace_file(directory_fd: int, name: str, content: bytes) -> None:
    _remove_entry(directory_fd, name)
    with os.fdopen(os.open(name, _NEW_FILE_FLAGS, 0o600, dir_fd=directory_fd), "wb") as file:
        file.write(content)


def _remove_entry(directory_fd: int, name: str) -> None:
    """Remove an entry. A directory is renamed instead, because removing one that an agent filled may take too long."""
    try:
        os.unlink(name, dir_fd=directory_fd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        os.rename(name, f"{name}.aside-{secrets.token_hex(4)}", src_dir_fd=directory_fd, dst_dir_fd=directory_fd)


class ProvisionedSandbox(msgspec.Struct, frozen=True):
    """A ready sandbox, and the agent that will run in it."""

    sandbox: Sandbox
    launch_spec: AgentLaunchSpec
    gateway_key: str


class ProvisionStep(msgspec.Struct, frozen=True):
    """Creates the sandbox of an attempt. driver: prepares the agent's command and files."""

    attempt: AttemptContext
    driver: AgentDriver
    runtime: Runtime
    image_locks: ImageLocks

    async def run(self) -> ProvisionedSandbox:
        """Store the handle, then create the sandbox. Raises AttemptError (provision_failed)."""
        attempt, image = self.attempt, self.attempt.image
        if image is not None:
            self.image_locks.acquire(image)
        manifest = attempt.task.manifest
        gateway_key = f"{self.driver.gateway_key_prefix}{secrets.token_urlsafe(32)}"
        launch_spec = self.driver.prepare(
            manifest_with_earlier_conversation(attempt),
            session_id=_session_id(attempt),
            gateway_key=gateway_key,
            secrets=attempt.secrets,
            resumes=attempt.resumes,
            session=None if attempt.resumes else read_inherited_session(attempt),
        )
        write_home_files(attempt.layout.home, launch_spec.home_files)
        handle = prepare_handle(attempt, self.runtime)
        spec = SandboxSpec(
            attempt_id=attempt.id,
            disk=attempt.layout.disk,
            cpus=manifest.vm.cpus,
            memory_bytes=manifest.vm.memory_bytes,
            processes_max=SANDBOX_PROCESSES_MAX,
            programs=launch_spec.programs,
            image=None if image is None else Path(image.directory),
            transparent_ports=transparent_ports(egress_rules(manifest.vm)),
            is_disk_reused=attempt.resumes,
            git_author=launch_spec.git_author,
        )
        sandbox = await self.runtime.create(handle, spec)
        attempt.recorder.record(
            SandboxCreated(
                sandbox_name=attempt.id, tier=self.runtime.tier, image=HOST_IMAGE if image is None else image.name
            )
        )
        if sandbox.slow_reason is not None:
            attempt.recorder.record(ErrorReported("sandbox_slow", sandbox.slow_reason))
        return ProvisionedSandbox(sandbox, launch_spec, gateway_key)


def _session_id(attempt: AttemptContext) -> str:
    """Return the id of the session to resume or continue, or a new id."""
    if not attempt.resumes:
        parent = attempt.task.parent
        return parent.session_id if parent is not None and parent.session_id is not None else str(uuid.uuid4())
    return next(one.session_id for one in reversed(attempt.task.past_attempts) if one.session_id is not None)


def make_confine(attempt: AttemptContext, runtime: Runtime) -> Confine:
    """Return a function that stores the handle and then creates a confinement."""
    vm = attempt.task.manifest.vm

    @asynccontextmanager
    async def confine(directories: Sequence[Path], read_only_directories: Sequence[Path]) -> AsyncIterator[Confinement]:
        handle = prepare_handle(attempt, runtime)
        spec = ConfinementSpec(vm.cpus, vm.memory_bytes, SANDBOX_PROCESSES_MAX, directories, read_only_directories)
        async with runtime.confine(handle, spec) as confinement:
            yield confinement

    return confine
