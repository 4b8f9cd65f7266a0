"""Parses the output of squeue and sinfo."""

import re
from collections.abc import Iterator, Sequence

from sandbox.cluster_engines.slurm.job_states import NO_HOST, REASON_CHARACTERS_MAX, SlurmJob
from sandbox.interfaces.cluster_engine import JOB_NAME_PATTERN, EngineHost
from sandbox.interfaces.worker_messages import HOST_NAME_PATTERN
from sandbox.model.printable import replace_unprintable, replacement_character
from sandbox.model.resources import Resources, pareto_frontier

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


_MIB = 1024**2

_LINE = re.compile(
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
        found = _LINE.fullmatch(line) or _LINE.fullmatch(f"{line}|")
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
