"""The message that a runner reads from its standard input: the server's order and the runner's settings."""

from typing import Literal

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.runner import FinishAttempt, Order, RunAttempt, RunDebugSession
from sandbox.model.disk_space import Watermark
from sandbox.model.fixed_limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT

NOT_RENEWED = 0.0
"""The deadline of a lease that has not been renewed yet."""


class RunnerSettings(msgspec.Struct, frozen=True):
    """Settings of every runner on this host, regardless of its order.

    data_dir, run_dir: paths of the journals and attempts, and of the control sockets.
    runtime: name of the runtime.
    excludes_emulation: the runtime was chosen by `auto`, so emulation is excluded.
    agent_programs: path of each agent's executable, keyed by the agent's manifest section. In a message of an earlier
        version, the only key is an empty string.
    disk_kind: the kind of disk that this host supports; a `plain` disk is a directory.
    can_confine: host programs that read untrusted data can be confined on this host.
    output_watermark: output is dropped if less disk space is free.
    lease_deadline: the first deadline of the gateway's lease, in seconds since the host booted (CLOCK_BOOTTIME);
        NOT_RENEWED until the first renewal, None if runners on this host have no lease.
    """

    data_dir: str
    run_dir: str
    runtime: str
    excludes_emulation: bool = False
    agent_programs: dict[str, str] = {}
    disk_kind: Literal["loop", "plain"] = "plain"
    can_confine: bool = False
    output_watermark: Watermark = Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)
    lease_deadline: float | None = None

    def agent_program(self, kind: str) -> str:
        """Return the path of this agent's executable; empty if the agent is not installed on this host."""
        return self.agent_programs.get(kind) or self.agent_programs.get("", "")


class LaunchMessage(msgspec.Struct, frozen=True, rename={"settings": "host"}):
    """An order and the runner's settings. It is sent through a pipe, because it contains secrets."""

    order: Order
    settings: RunnerSettings


class LegacyLaunchMessage(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={
        "is_debug_session": "visit",
        "disk_kind": "disks",
        "can_confine": "confines",
        "excludes_emulation": "auto",
    },
):
    """The message of earlier versions: one record for all orders and for the runner's settings.

    A server of such a version starts runners of this version if the installation is upgraded while the server is
    running.
    """

    task_id: str
    attempt_id: str
    data_dir: str
    run_dir: str
    runtime: str
    upstream: ModelUpstream | None = None
    finish: bool = False
    is_debug_session: bool = False
    resumes: bool = False
    agent_program: str = ""
    disk_kind: Literal["loop", "plain"] = "plain"
    can_confine: bool = False
    excludes_emulation: bool = False
    image: Image | None = None
    secrets: dict[str, str] = {}
    follow_redirects: bool = True
    output_watermark: Watermark = Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)
    version: int = 1

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return f"LegacyLaunchMessage({self.task_id!r}, {self.attempt_id!r})"

    def to_message(self) -> LaunchMessage:
        """Return the same order in the current form."""
        settings = RunnerSettings(
            self.data_dir,
            self.run_dir,
            self.runtime,
            excludes_emulation=self.excludes_emulation,
            agent_programs={"": self.agent_program},
            disk_kind=self.disk_kind,
            can_confine=self.can_confine,
            output_watermark=self.output_watermark,
        )
        return LaunchMessage(self._order(), settings)

    def _order(self) -> Order:
        if self.finish:
            return FinishAttempt(self.task_id, self.attempt_id, self.secrets)
        if self.is_debug_session:
            return RunDebugSession(self.task_id, self.attempt_id, self.image, self.secrets)
        return RunAttempt(
            self.task_id,
            self.attempt_id,
            self.upstream,
            self.image,
            self.secrets,
            resumes=self.resumes,
            clone_follows_redirects=self.follow_redirects,
            records_conversation=False,
        )


def decode_launch_message(data: bytes) -> LaunchMessage:
    """Decode a message of this or an earlier version.

    Raises msgspec.DecodeError if it is incomplete, msgspec.ValidationError if it is not a launch message.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    if "order" in fields:
        return msgspec.json.decode(data, type=LaunchMessage)
    return msgspec.json.decode(data, type=LegacyLaunchMessage).to_message()
