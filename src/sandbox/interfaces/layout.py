"""Where a task's files lie: below the data directory, and its runner's socket below the run directory."""

from collections.abc import Iterator
from pathlib import Path

import msgspec


def tasks_root(data_dir: Path) -> Path:
    """One directory a task, by its id."""
    return data_dir / "tasks"


def pruned_root(data_dir: Path) -> Path:
    """What is left of tasks that are kept no longer, until it is removed."""
    return data_dir / "pruned"


def runner_socket(run_dir: Path, attempt_id: str) -> Path:
    """Where an attempt's runner takes orders."""
    return run_dir / f"{attempt_id}.sock"


def probe_directory(run_dir: Path, probe_id: str) -> Path:
    """What a probe makes, which has an id as an attempt has."""
    return run_dir / f"probe-{probe_id}"


class TaskLayout(msgspec.Struct, frozen=True):
    """The directory of one task. Task ids are safe path components by the manifest's rule."""

    data_dir: Path
    task_id: str

    @property
    def root(self) -> Path:
        """Everything of the task."""
        return tasks_root(self.data_dir) / self.task_id

    @property
    def artifacts(self) -> Path:
        """One file an artifact, by its name."""
        return self.root / "artifacts"

    @property
    def attempts_root(self) -> Path:
        """One directory an attempt, by its id."""
        return self.root / "attempts"

    def attempt(self, attempt_id: str) -> "AttemptLayout":
        """The directory of one attempt."""
        return AttemptLayout(self.attempts_root / attempt_id)

    def attempts(self) -> Iterator["AttemptLayout"]:
        """The directories of all attempts, in no order."""
        attempts = self.attempts_root
        return (self.attempt(path.name) for path in (attempts.iterdir() if attempts.is_dir() else ()))


class AttemptLayout(msgspec.Struct, frozen=True):
    """The directory of one attempt; gone after teardown but for the runner's log."""

    root: Path

    @property
    def handle(self) -> Path:
        """The sandbox's handle, written before anything of the sandbox is created."""
        return self.root / "handle.json"

    @property
    def reserve(self) -> Path:
        """Room for the end of the task, given back when there is none left."""
        return self.root / "reserve"

    @property
    def debug_session_lock(self) -> Path:
        """Held by whoever uses a preserved disk: a runner for shells, or who releases it."""
        return self.root / "visit.lock"

    @property
    def secret_fingerprint(self) -> Path:
        """By what the values that the agent had are known again; it goes where the disk goes."""
        return self.root / "secrets.fingerprint"

    @property
    def disk(self) -> Path:
        """`workspace`, `home` and `tmp` of the sandbox."""
        return self.root / "disk"

    @property
    def disk_image(self) -> Path:
        """The file system that is mounted at `disk` while the attempt goes on, where one can be mounted."""
        return self.root / "disk.img"

    @property
    def workspace(self) -> Path:
        """The clone, which the sandbox has at `inside.WORKSPACE`."""
        return self.disk / "workspace"

    @property
    def home(self) -> Path:
        """/home/agent inside."""
        return self.disk / "home"

    @property
    def tmp(self) -> Path:
        """The directory for temporary files inside."""
        return self.disk / "tmp"

    @property
    def repository(self) -> Path:
        """The host's own git directory."""
        return self.root / "repository.git"

    @property
    def ignore_rules(self) -> Path:
        """The base commit's `.gitignore` files, while the patch is made."""
        return self.root / "ignore-rules"

    @property
    def runner_log(self) -> Path:
        """What the runner says for operators; nothing of a task's content."""
        return self.root / "runner.log"


SANDBOX_UID = 1000
SANDBOX_USER = "agent"
SANDBOX_HOME = "/home/agent"
SANDBOX_WORKSPACE = "/workspace"
NODE_DIRECTORY = "/opt/node"
"""Where Node.js is installed, its programs in `bin`."""

MODEL_PORT = 8123
"""Where the gateway plays the model's API, on 127.0.0.1."""

PROXY_PORT = 3128
"""Where the gateway is an HTTP proxy, on 127.0.0.1."""
