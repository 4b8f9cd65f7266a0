"""Engines queue, place, limit and end workers on the hosts of a cluster.

Sandbox submits one job for each task, and another one if the job is lost. A job runs one process, the worker. A job is
identified by its name, which contains the id of the first attempt that it runs. The ids of an engine are for display
only: Slurm reuses them after a crash of its controller.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from sandbox.interfaces.task_file_layout import ATTEMPT_ID_PATTERN
from sandbox.model.errors import SandboxError
from sandbox.model.resources import Resources

JOB_NAME_PATTERN = f"sandbox-{ATTEMPT_ID_PATTERN}"
"""The names of jobs. They are also valid names of objects in Kubernetes."""


def job_name(attempt_id: str) -> str:
    """Return the name of the job that runs an attempt."""
    return f"sandbox-{attempt_id}"


HOST_NAME_VARIABLE = "SANDBOX_HOST_NAME"
"""The environment variable with the engine's name for a worker's host, if the engine sets it."""

IDENTITY_FILE_VARIABLE = "SANDBOX_IDENTITY_FILE"
"""The environment variable with the path of the file that contains a worker's identity token, if there is one."""

IDENTITY_TOKEN_PATTERN = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}"
IDENTITY_TOKEN_CHARACTERS_MAX = 6144
"""The form of an identity token (a JSON Web Token, RFC 7519)."""


class EngineUnavailableError(SandboxError):
    """The engine is not responding, or it cannot accept jobs now. A request may still take effect later."""

    code = "engine_unavailable"
    retryable = True


class EngineRejectedError(SandboxError):
    """The engine rejected the job and would reject it again, for example because no host is large enough."""

    code = "engine_rejected"


class JobRequest(msgspec.Struct, frozen=True):
    """A job to submit.

    name: see `job_name`.
    command: the worker (an absolute path) and its arguments. All users of the cluster can read the command.
    environment: the environment of the worker. The engine stores these variables, and may add its own.
    resources: what the task requests, and what the worker, the runner and the runtime need in addition.
    time_limit_seconds: the time after which the engine ends the worker, at the earliest.
    grace_seconds: the time between SIGTERM and SIGKILL at the time limit. After `cancel`, the engine's own settings
        determine this time.
    output_file: the file on the host to which the worker's output is appended. Its directory must exist. If it is
        /dev/null, an engine may keep the output elsewhere.
    excluded_hosts: the hosts on which the engine must not start the worker. Names that the engine does not have are
        ignored.

    A worker that ends because of SIGTERM must exit with a code other than 0. The exit code 0 does not prove that the
    worker has ended if the engine ended the job (`JobPhase.UNREACHABLE`).
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    resources: Resources
    time_limit_seconds: int
    grace_seconds: int = 30
    output_file: str = "/dev/null"
    excluded_hosts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Omit the environment, which must not reach logs or tracebacks."""
        return f"JobRequest({self.name!r})"


class JobPhase(StrEnum):
    """The phase of a job, as the engine reports it.

    WAITING: the engine has not started a worker yet, or lost the record of the start in a crash of its controller. The
        job is waiting for resources, or can never run: see the reason.
    RUNNING: the worker was started, or is being started, suspended or ended.
    ENDED: no worker of this job is running, and none will be started. Only this phase proves that a worker is dead.
        Other processes of the job may still run: without control groups, Slurm does not find them once the worker has
        ended.
    UNREACHABLE: the engine has given up on the job, but its host has not confirmed that the worker has ended. The
        worker may still run if the host is cut off from the network. The engine will not start another one.
    UNKNOWN: the engine has no job with this name: none was submitted, or the engine lost the job in a crash, or the job
        ended long ago. If no worker has claimed the attempt, the job can be submitted again. Otherwise, UNKNOWN does
        not show whether the worker is alive.
    """

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    UNREACHABLE = "unreachable"
    UNKNOWN = "unknown"


class JobStatus(msgspec.Struct, frozen=True):
    """The status of a job.

    host: the host on which the engine started the worker; empty if there is none.
    reason: why the job is in this phase (human-readable); may be empty.
    job_id: the engine's id of the job, for display.
    duplicate_ids: the ids of further jobs with the same name, which a crash between two submissions can cause.
    is_ending: the engine is ending the running worker, so the worker must no longer claim its attempt.
    """

    phase: JobPhase
    host: str = ""
    reason: str = ""
    job_id: str = ""
    duplicate_ids: tuple[str, ...] = ()
    is_ending: bool = False


class EngineHost(msgspec.Struct, frozen=True):
    """A host of the cluster, as the engine reports it.

    resources: what jobs can request there in total.
    problem: why the engine starts no jobs there now (human-readable); empty if it starts jobs.
    """

    name: str
    resources: Resources
    problem: str = ""


class Engine(Protocol):
    """Runs workers on the hosts of a cluster.

    Every method takes at most a minute, and raises EngineUnavailableError if the engine is not responding. If the task
    that awaits a call is cancelled, the call may still take effect. Engines raise ValueError for names that do not
    match JOB_NAME_PATTERN.
    """

    async def submit(self, request: JobRequest) -> None:
        """Submit a job, unless the engine has a job with this name in any phase.

        Raises EngineRejectedError, for example because the engine has no host that is large enough and not excluded.

        If the call fails with EngineUnavailableError, the job may or may not have been submitted: call `submit` again.
        """
        ...

    async def cancel(self, name: str) -> None:
        """Remove a waiting job, or end the worker of a running job. Idempotent; does not wait for the end.

        The worker gets SIGTERM first, and SIGKILL after the engine's grace period. Other processes of the job may get
        both signals too. Does nothing if the engine has no job with this name.
        """
        ...

    async def reconcile_jobs(self, names: Collection[str]) -> Mapping[str, JobStatus]:
        """Return the status of every job with one of these names.

        Also cancels duplicates that have not started, and starts waiting jobs that fit if the engine has no scheduler.
        """
        ...

    async def maximal_host_sizes(self) -> Sequence[Resources]:
        """Return the sizes of the largest hosts of the cluster, whether or not they are available now.

        None of them is smaller than another one in every resource. A job that fits in none of them can never run.
        """
        ...

    async def hosts(self) -> Sequence[EngineHost]:
        """Return all hosts on which jobs may run, sorted by name, whether or not they are available now."""
        ...


class WorkerRejectedError(Exception):
    """The identity token does not prove that the worker belongs to this job and runs on the host that it claims."""


class WorkerVerifier(Protocol):
    """Checks the identity tokens of an engine. A token proves which job a worker belongs to and which host it is on."""

    async def verify(self, name: str, host: str, token: str) -> None:
        """Check that a token was issued to a worker of this job on this host.

        Raises WorkerRejectedError, EngineUnavailableError.
        """
        ...
