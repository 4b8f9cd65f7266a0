"""File layout: a task's files under the data directory, and its runner's socket under the run directory."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec


def tasks_root(data_dir: Path) -> Path:
    """Return the directory that contains one directory per task, named after the task's id."""
    return data_dir / "tasks"


def pruned_root(data_dir: Path) -> Path:
    """Return the directory that contains the files of pruned tasks until the janitor deletes them."""
    return data_dir / "pruned"


ATTEMPT_ID_PATTERN = "[a-z2-7]{12}"
AttemptId = Annotated[str, msgspec.Meta(pattern=rf"\A{ATTEMPT_ID_PATTERN}\Z")]


def new_attempt_id() -> str:
    """Return a random id of an attempt or a probe: twelve base32 characters (60 bits)."""
    return base64.b32encode(os.urandom(8)).decode().lower()[:12]


def runner_socket(run_dir: Path, attempt_id: str) -> Path:
    """Return the control socket of an attempt's runner."""
    return run_dir / f"{attempt_id}.sock"


def probe_directory(run_dir: Path, probe_id: str) -> Path:
    """Return the directory of a probe, whose id has the format of an attempt id."""
    return run_dir / f"probe-{probe_id}"


class TaskLayout(msgspec.Struct, frozen=True):
    """The paths of one task's files. The validation of manifests ensures that a task id is a safe path component."""

    data_dir: Path
    task_id: str

    @property
    def root(self) -> Path:
        """The task's directory."""
        return tasks_root(self.data_dir) / self.task_id

    @property
    def journal(self) -> Path:
        """The directory of the journal and its lock."""
        return self.root / "journal"

    @property
    def artifacts(self) -> Path:
        """The directory that contains one file per artifact, named after the artifact."""
        return self.root / "artifacts"

    @property
    def attempts_root(self) -> Path:
        """The directory that contains one directory per attempt, named after the attempt's id."""
        return self.root / "attempts"

    def attempt(self, attempt_id: str) -> "AttemptLayout":
        """Return the paths of one attempt."""
        return AttemptLayout(self.attempts_root / attempt_id)

    def attempts(self) -> Iterator["AttemptLayout"]:
        """Return the paths of all attempts, unordered."""
        attempts = self.attempts_root
        return (self.attempt(path.name) for path in (attempts.iterdir() if attempts.is_dir() else ()))


class AttemptLayout(msgspec.Struct, frozen=True):
    """The paths of one attempt's files. After teardown, only the runner's log is left."""

    root: Path

    @property
    def handle(self) -> Path:
        """The sandbox's handle, written before any part of the sandbox is created."""
        return self.root / "handle.json"

    @property
    def reserve(self) -> Path:
        """Disk space reserved for the records that end the task, released when the disk is full."""
        return self.root / "reserve"

    @property
    def preserved_disk_lock(self) -> Path:
        """Lock on a preserved disk, held by the runner of a debug session and during a release of the disk."""
        return self.root / "visit.lock"

    @property
    def secret_fingerprint(self) -> Path:
        """Fingerprint of the secret values that the agent had. The fingerprint moves with the disk."""
        return self.root / "secrets.fingerprint"

    @property
    def disk(self) -> Path:
        """The directory with the sandbox's `workspace`, `home/agent` and `tmp`. No agent can write to it directly."""
        return self.root / "disk"

    @property
    def disk_image(self) -> Path:
        """The file system that is mounted at `disk` during the attempt, if one can be mounted."""
        return self.root / "disk.img"

    @property
    def workspace(self) -> Path:
        """The clone, SANDBOX_WORKSPACE in the sandbox."""
        return self.disk / "workspace"

    @property
    def home(self) -> Path:
        """The agent's home directory, SANDBOX_HOME in the sandbox."""
        return self.disk / "home" / "agent"

    @property
    def tmp(self) -> Path:
        """The directory for temporary files in the sandbox."""
        return self.disk / "tmp"

    @property
    def host_git_directory(self) -> Path:
        """The host's own git directory."""
        return self.root / "repository.git"

    @property
    def ignore_rules(self) -> Path:
        """The directory for the base commit's `.gitignore` files while the patch is made."""
        return self.root / "ignore-rules"

    @property
    def runner_log(self) -> Path:
        """The runner's log for operators; contains no task content."""
        return self.root / "runner.log"
