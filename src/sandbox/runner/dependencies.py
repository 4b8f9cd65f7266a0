"""Dependencies of a runner, and the context of its attempt."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandbox.interfaces.agent import AgentDriver
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disks, RemovePaths
from sandbox.interfaces.file_layout import AttemptLayout, TaskLayout
from sandbox.interfaces.gateway import GatewayFactory, ModelUpstream
from sandbox.interfaces.images import Image, ImageLeases
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.runtime import Confine, Runtime
from sandbox.interfaces.secrets import Redactor
from sandbox.interfaces.workspace import Workspaces
from sandbox.model.task import Task
from sandbox.runner.attempt_recorder import AttemptRecorder
from sandbox.system.cpu_throttle import CpuThrottle


class RunnerDependencies(msgspec.Struct, frozen=True):
    """The components of a runner, behind their interfaces. boot_id: the host's current boot.

    confine: confines host programs; None uses the runtime.
    throttle: limits the CPU usage of all work that a sandbox causes in its runner.
    """

    journals: Journals
    disks: Disks
    remove: RemovePaths
    images: ImageLeases
    runtime: Runtime
    gateways: GatewayFactory
    agent: AgentDriver
    workspaces: Workspaces
    clock: Clock
    boot_id: str
    confine: Confine | None = None
    throttle: CpuThrottle = msgspec.field(default_factory=CpuThrottle)


class AttemptContext(msgspec.Struct, frozen=True):
    """The current attempt: its id, files and recorder.

    secrets: values by name.
    redaction: removes those values from all output; None without secrets.
    image: becomes the sandbox's /; None for the host's own /usr.
    records_conversation: the server reads conversation events.
    """

    id: str
    data_dir: Path
    upstream: ModelUpstream | None
    recorder: AttemptRecorder
    dependencies: RunnerDependencies
    secrets: Mapping[str, str] = {}
    redaction: Redactor | None = None
    image: Image | None = None
    records_conversation: bool = True

    def __repr__(self) -> str:
        """Omit the secrets."""
        return f"{type(self).__name__}({self.id!r})"

    @property
    def task(self) -> Task:
        """The current task."""
        return self.recorder.task

    @property
    def resumes(self) -> bool:
        """Whether the attempt continues with the previous attempt's disk."""
        return self.task.attempt is not None and self.task.attempt.resumes

    @property
    def layout(self) -> AttemptLayout:
        """The attempt's own directory."""
        return self.task_layout.attempt(self.id)

    @property
    def task_layout(self) -> TaskLayout:
        """The task's directory."""
        return TaskLayout(self.data_dir, self.recorder.task.id)
