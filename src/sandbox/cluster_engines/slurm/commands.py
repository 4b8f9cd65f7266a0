"""Slurm's commands: the arguments and script of sbatch, and the jobs and hosts that squeue and sinfo print.

The phase of a job is determined from the state that Slurm reports:

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
started the worker nevertheless, so the end of such a job is never certain.
"""

import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sandbox.cluster_engines import check_job_name
from sandbox.interfaces.cluster_engine import JOB_NAME_PATTERN, EngineHost, JobPhase, JobRequest, JobStatus
from sandbox.interfaces.worker_messages import HOST_NAME_PATTERN
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.resources import Resources, pareto_frontier

SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the signal up to this much earlier than requested (sbatch(1), --signal)."""

_MIB = 1024**2
_EXTRA_NAMES = (
    *("constraint", "exclude", "exclusive", "gres", "licenses", "nice", "nodelist", "qos", "reservation"),
    *("tmp", "wckey"),
)
"""The options that settings may contain. Other options could change behavior that the engine relies on."""

_EXTRA_OPTION = re.compile(rf"--(?:{'|'.join(_EXTRA_NAMES)})(?:=[\x21-\x7e]{{1,256}})?")
_EXCLUDE = "--exclude="
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED_VARIABLE = re.compile(r"(?:SLURM|SBATCH|SPANK|_SLURM)_.*|LD_.*")


def find_option_error(option: str) -> str | None:
    """Return why the settings must not contain this option of sbatch; None if they may."""
    if _EXTRA_OPTION.fullmatch(option):
        return None
    return f"must be one of the options {', '.join(f'--{name}' for name in _EXTRA_NAMES)}, as --name=value"


class SlurmSettings(NamedTuple):
    """Settings of the `slurm` engine.

    partition, account: used for all jobs; None for the cluster's defaults.
    extra_options: further options of sbatch; see `find_option_error`.
    commands_dir: the directory of Slurm's commands; None for those on the standard path.
    configuration_path: the path of slurm.conf; None for the default path.
    """

    partition: str | None = None
    account: str | None = None
    extra_options: tuple[str, ...] = ()
    commands_dir: str | None = None
    configuration_path: str | None = None


def sbatch_arguments(request: JobRequest, settings: SlurmSettings, excluded_hosts: Sequence[str] = ()) -> list[str]:
    """Return the arguments of sbatch, which reads the script from its standard input.

    excluded_hosts: the request's excluded hosts that exist in Slurm. sbatch uses only the last option `--exclude`, so
    these hosts are added to the excluded hosts of the settings.

    All users of the cluster can read the arguments, which therefore contain no secrets. `--dependency=singleton` keeps
    Slurm from starting a duplicate while another job has this name. `--export=ALL` passes on the environment of sbatch,
    which is the request's environment. `--export=NONE` would start a login shell on the host to read the user's
    environment. `--propagate=NONE` keeps the server's resource limits from applying to the worker.
    """
    check_job_name(request.name)
    output = _escape_file_name(request.output_file)
    excluded = [option.removeprefix(_EXCLUDE) for option in settings.extra_options if option.startswith(_EXCLUDE)][-1:]
    return [
        "--parsable",
        f"--job-name={request.name}",
        "--dependency=singleton",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={max(1, request.resources.cpus)}",
        f"--mem={max(1, math.ceil(request.resources.memory_bytes / _MIB))}M",
        f"--time={_time_limit_minutes(request)}",
        f"--signal=B:TERM@{request.grace_seconds}",
        "--no-requeue",
        "--export=ALL",
        "--propagate=NONE",
        "--chdir=/",
        "--input=/dev/null",
        f"--output={output}",
        f"--error={output}",
        "--open-mode=append",
        *([f"--partition={settings.partition}"] if settings.partition else []),
        *([f"--account={settings.account}"] if settings.account else []),
        *(option for option in settings.extra_options if not option.startswith(_EXCLUDE)),
        *([_EXCLUDE + ",".join([*excluded, *excluded_hosts])] if excluded or excluded_hosts else []),
    ]


def _time_limit_minutes(request: JobRequest) -> int:
    """Return a limit that gives the worker its full time even if Slurm sends SIGTERM too early."""
    return math.ceil((request.time_limit_seconds + request.grace_seconds + SIGNAL_EARLY_SECONDS) / 60)


def _escape_file_name(path: str) -> str:
    """Escape a file name, so that sbatch uses it unchanged. Raises ValueError."""
    if not Path(path).is_absolute() or not path.isprintable() or "\\" in path:
        raise ValueError(f"the path of the output file must be absolute and printable, without backslashes: {path!r}")
    return path.replace("%", "%%")


def job_script(request: JobRequest) -> str:
    """Return the script. The worker replaces the shell, so signals to the script reach the worker. Raises ValueError.

    sbatch reads options only from comments before the first command.
    """
    if not request.command or not Path(request.command[0]).is_absolute() or "\0" in "".join(request.command):
        raise ValueError("the worker's command must start with an absolute path and contain no NUL")
    return f"#!/bin/sh\nexec {shlex.join(request.command)}\n"


def sbatch_environment(request: JobRequest) -> Mapping[str, str]:
    """Return the environment of sbatch, which Slurm passes on to the worker. Raises ValueError.

    Variables that would change the behavior of sbatch are rejected.
    """
    for name, value in request.environment.items():
        if not _VARIABLE.fullmatch(name) or _RESERVED_VARIABLE.fullmatch(name) or "\0" in value:
            raise ValueError(f"the worker's environment must not contain the variable {name!r}")
    return request.environment


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
            return f"The job is waiting in Slurm's queue ({self.reason})."
        if self.phase is JobPhase.RUNNING:
            return "" if self.state == "RUNNING" else f"Slurm reports the state {self.state}."
        code, signal = self.exit_status
        exit_text = f" with exit code {code}" if code else f" with signal {signal}" if signal else ""
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


def summarize_jobs(names: Collection[str], jobs: Iterable[SlurmJob]) -> JobsSummary:
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


SQUEUE_FORMAT = ",".join(
    f"{field}:|" for field in ("JobID", "State", "BatchHost", "exit_code", "restartcnt", "Name", "Reason")
)
"""The fields of a line of squeue (squeue(1), --Format). Only the last field can contain the separator."""

SINFO_FORMAT = "%c|%m|%d|%P"
"""The fields of a line of sinfo (sinfo(1), --format): CPUs, memory in MiB, disk in MiB, and partition."""

SINFO_HOST_FORMAT = f"%N|%T|{SINFO_FORMAT}"
"""The fields of a line of `sinfo --Node`: host, state, and those of SINFO_FORMAT.

The reason for a state (%E) is omitted, because it is free text with newlines.
"""

UNLIMITED_DISK_BYTES = 2**62
"""Disk size of a host for which the administrator has not configured `TmpDisk`."""

_JOB_LINE = re.compile(
    rf"(?P<id>\d+)\|(?P<state>[A-Z_?]+)\|(?P<host>[^|\s]*)\|(?P<status>\d+):(?P<signal>\d+)\|(?P<restarts>\d+)\|"
    rf"(?P<name>{JOB_NAME_PATTERN})\|(?P<reason>.*)\|"
)
_HOST_LINE = re.compile(
    rf"(?:(?P<name>{HOST_NAME_PATTERN})\|(?P<state>[A-Za-z_]{{1,40}})(?P<flags>[^\w|]{{0,4}})\|)?"
    r"(?P<cpus>\d{1,9})\+?\|(?P<memory>\d{1,15})\+?\|(?P<disk>\d{1,15})\+?\|(?P<partition>[^|]+)"
)
_STARTING_STATES = frozenset({"allocated", "completing", "idle", "mixed", "planned", "reserved"})
"""The states of hosts on which Slurm starts jobs, if they have free resources."""

_NOT_STARTING_FLAGS = frozenset("*$@^!")
"""Flags after a state: the host is not responding, is in maintenance, is restarting, or will be powered down."""


class UnexpectedOutputError(ValueError):
    """A line of Slurm's output has an unknown format."""

    def __init__(self, line: str) -> None:
        super().__init__(replace_unprintable(line[:100], replacement_character))


def parse_jobs(output: str) -> Iterator[SlurmJob]:
    """Yield the jobs in the output of squeue.

    Lines that do not start with an id belong to the reason of the job before them. Raises UnexpectedOutputError.
    """
    for line in output.split("\n"):
        if not re.match(r"\d[^|\s]*\|", line):
            continue
        found = _JOB_LINE.fullmatch(line) or _JOB_LINE.fullmatch(f"{line}|")
        if found is None:
            raise UnexpectedOutputError(line)
        host, reason = found["host"], replace_unprintable(found["reason"], replacement_character)
        yield SlurmJob(
            job_id=found["id"],
            state=found["state"],
            host="" if host in NO_HOST else host,
            exit_status=(int(found["status"]), int(found["signal"])),
            restarts=int(found["restarts"]),
            name=found["name"],
            reason=reason[:REASON_CHARACTERS_MAX],
        )


def parse_largest_host_sizes(output: str, partition: str | None) -> Sequence[Resources]:
    """Return the sizes of the largest hosts in the output of sinfo (`pareto_frontier`).

    partition: None for the default partition, which sinfo marks with an asterisk. Raises UnexpectedOutputError.
    """
    return pareto_frontier({_resources(line) for line in _lines_of_partition(output, partition)})


def parse_hosts(output: str, partition: str | None) -> Sequence[EngineHost]:
    """Return the hosts in the output of `sinfo --Node`, sorted by name.

    partition: None for the default partition. Raises UnexpectedOutputError.
    """
    hosts: dict[str, EngineHost] = {}
    for line in _lines_of_partition(output, partition):
        if line["name"] is None:
            raise UnexpectedOutputError(line.string)
        state, flags = line["state"].lower(), line["flags"]
        is_starting = state in _STARTING_STATES and not _NOT_STARTING_FLAGS & {*flags}
        problem = "" if is_starting else f"Slurm reports the state {state}{flags}."
        hosts[line["name"]] = EngineHost(line["name"], _resources(line), problem)
    return [hosts[name] for name in sorted(hosts)]


def _lines_of_partition(output: str, partition: str | None) -> Iterator[re.Match[str]]:
    for line in filter(None, output.split("\n")):
        found = _HOST_LINE.fullmatch(line)
        if found is None:
            raise UnexpectedOutputError(line)
        if partition is not None or found["partition"].endswith("*"):
            yield found


def _resources(line: re.Match[str]) -> Resources:
    disk_bytes = int(line["disk"]) * _MIB or UNLIMITED_DISK_BYTES
    return Resources(int(line["cpus"]), int(line["memory"]) * _MIB, disk_bytes)
