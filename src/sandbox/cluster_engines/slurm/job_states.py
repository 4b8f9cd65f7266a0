"""Determines the phase of a job from the state that Slurm reports.

| state in Slurm | phase |
| --- | --- |
| PENDING, REQUEUED, REQUEUE_FED, REQUEUE_HOLD, RESV_DEL_HOLD, SPECIAL_EXIT | waiting |
| RUNNING, CONFIGURING, COMPLETING, SUSPENDED, STOPPED, SIGNALING, RESIZING, STAGE_OUT | running |
| COMPLETED, FAILED, OUT_OF_MEMORY | ended: the host reported the end of the script |
| CANCELLED, TIMEOUT, PREEMPTED, DEADLINE | ended if the job has no host, or if its host reported an exit status |
| the same with the exit status 0 | unreachable |
| NODE_FAIL, BOOT_FAIL, REVOKED and all others | unreachable |

The controller itself decides on CANCELLED, TIMEOUT and PREEMPTED. While the job's host is connected, the job is
COMPLETING until the host confirms the end of all processes. If the host does not respond, the job leaves COMPLETING
once `SlurmdTimeout` has passed, although its processes may still be running on a host that is cut off. Only the exit
status shows the difference: the controller sets it when the host reports how the script ended. The status 0 is also the
initial value.

Slurm starts a job again despite `--no-requeue` if a host did not respond to the request to start it. That host may have
started the worker all the same, so the end of such a job is never certain.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from sandbox.interfaces.cluster_engine import JobPhase, JobStatus

_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
_RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
)
_ENDING = frozenset({"COMPLETING", "STAGE_OUT"})
_REPORTED_BY_HOST = frozenset({"COMPLETED", "FAILED", "OUT_OF_MEMORY"})
_DECIDED_BY_CONTROLLER = frozenset({"CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE"})
NO_HOST = frozenset({"", "n/a", "(null)", "None"})
REASON_CHARACTERS_MAX = 200


class SlurmJob(NamedTuple):
    """One job in the output of squeue. exit_status: the script's exit code and signal. restarts: number of restarts."""

    job_id: str
    state: str
    host: str
    exit_status: tuple[int, int]
    restarts: int
    name: str
    reason: str

    @property
    def was_started(self) -> bool:
        """Whether a host may have started the worker."""
        return bool(self.host) or self.restarts > 0

    @property
    def was_refused(self) -> bool:
        """Whether Slurm refused the submission. Slurm keeps a record of some jobs that it refused."""
        return self.state == "FAILED" and not self.was_started

    @property
    def phase(self) -> JobPhase:
        """The phase; see the module's table."""
        if self.state in _WAITING:
            return JobPhase.WAITING
        if self.state in _RUNNING:
            return JobPhase.RUNNING
        has_report = self.state in _REPORTED_BY_HOST or (
            self.state in _DECIDED_BY_CONTROLLER and (self.exit_status != (0, 0) or not self.was_started)
        )
        return JobPhase.ENDED if has_report and self.restarts == 0 else JobPhase.UNREACHABLE

    def describe(self) -> str:
        """Return why the job is in its phase (human-readable)."""
        if self.phase is JobPhase.WAITING:
            return f"The job waits in Slurm's queue ({self.reason})."
        if self.phase is JobPhase.RUNNING:
            return "" if self.state == "RUNNING" else f"Slurm reports the state {self.state}."
        code, signal = self.exit_status
        exit_text = f" with the exit code {code}" if code else f" by the signal {signal}" if signal else ""
        if self.phase is JobPhase.ENDED:
            return f"Slurm reports that the job ended{exit_text} ({self.state})."
        subject = f"the host {self.host} has not" if self.host else "no host has"
        return f"Slurm reports the state {self.state}, but {subject} confirmed that the worker ended."


def _rank(job: SlurmJob) -> tuple[int, int]:
    """Return the rank of a job among jobs with the same name. The first of these jobs determines the status.

    A started job comes before a waiting one, because its worker may have claimed the attempt. A job that was cancelled
    before it started comes last: it was cancelled as a duplicate.
    """
    if job.phase is JobPhase.ENDED:
        rank = 2 if job.was_started else 4
    else:
        rank = {JobPhase.RUNNING: 0, JobPhase.UNREACHABLE: 1, JobPhase.WAITING: 3}[job.phase]
    return rank, int(job.job_id)


class JobsSummary(NamedTuple):
    """The status of each requested name. waiting_duplicates: waiting jobs with another job's name, keyed by name."""

    statuses: Mapping[str, JobStatus]
    waiting_duplicates: Mapping[str, Sequence[str]]


def summarize(names: Collection[str], jobs: Iterable[SlurmJob]) -> JobsSummary:
    """Return the status of each name."""
    by_name: dict[str, list[SlurmJob]] = {name: [] for name in names}
    for job in jobs:
        if job.name in by_name and not job.was_refused:
            by_name[job.name].append(job)
    statuses: dict[str, JobStatus] = {}
    waiting_duplicates: dict[str, Sequence[str]] = {}
    for name, found in by_name.items():
        if not found:
            statuses[name] = JobStatus(JobPhase.UNKNOWN, reason="Slurm has no job with this name.")
            continue
        first, *others = sorted(found, key=_rank)
        duplicates = [job for job in others if job.was_started or job.phase is not JobPhase.ENDED]
        statuses[name] = JobStatus(
            first.phase,
            first.host,
            first.describe(),
            first.job_id,
            tuple(job.job_id for job in duplicates),
            is_ending=first.state in _ENDING,
        )
        if waiting := [job.job_id for job in others if job.phase is JobPhase.WAITING]:
            waiting_duplicates[name] = waiting
    return JobsSummary(statuses, waiting_duplicates)
