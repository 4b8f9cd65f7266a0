"""Submits, cancels and looks up jobs with Slurm's commands.

The commands sbatch, squeue, scancel and sinfo suffice: Slurm's accounting database is not needed. Slurm forgets an
ended job after `MinJobAge` (slurm.conf, five minutes by default). From then on, the job is `UNKNOWN`.
"""

import asyncio
import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, TypeVar

from sandbox.cluster_engines import check_job_name
from sandbox.cluster_engines.slurm.commands import (
    SINFO_FORMAT,
    SINFO_HOST_FORMAT,
    SQUEUE_FORMAT,
    JobsSummary,
    SlurmSettings,
    UnexpectedOutputError,
    job_script,
    parse_hosts,
    parse_jobs,
    parse_largest_host_sizes,
    sbatch_arguments,
    sbatch_environment,
    summarize_jobs,
)
from sandbox.interfaces.cluster_engine import (
    EngineHost,
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    JobStatus,
)
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.resources import Resources
from sandbox.primitives.concurrency import KeyedLock

_Host = TypeVar("_Host", Resources, EngineHost)
_log = logging.getLogger(__name__)

COMMAND_TIMEOUT_SECONDS = 25.0
"""Time limit for one command. Slurm's own commands wait for minutes if a connected controller is not responding."""

CONCURRENT_COMMANDS_MAX = 4
"""Number of concurrent commands. Each one is a request to the controller, which serves all users of the cluster."""

NAMES_PER_COMMAND = 2000
"""Number of names in one argument of squeue. The kernel limits an argument to 128 KiB."""

OUTPUT_BYTES_MAX = 16 * 1024 * 1024
"""Maximum size of a command's output. The kernel ends a command that prints more."""

_KILL_SECONDS = 5.0
_ERROR_CHARACTERS_MAX = 400
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/opt/slurm/bin"
"""Where Slurm's commands are, unless the settings name another directory."""

_LIMIT_OUTPUT = ("/usr/bin/prlimit", f"--fsize={OUTPUT_BYTES_MAX}", "--")
_DIE_WITH_PARENT = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
"""Makes the kernel kill a command when the server dies, so that the command does not submit a job afterwards."""

_TEMPORARY_ERRORS = (
    *("Unable to contact slurm controller", "Communication", "Socket timed out", "Zero Bytes were transmitted"),
    *("Rate limit exceeded", "standby mode", "Slurm temporarily unable", "job queue full", "temporarily disabled"),
    *("Unable to create job record", "MaxSubmitJob", "MaxJobCount", "authentication", "Transport endpoint"),
    *("Connection refused", "Connection timed out", "Resource temporarily unavailable", "Unable to establish"),
)
"""Parts of error messages after which a new submission may succeed. sbatch has only one exit code for errors."""


class _CommandResult(NamedTuple):
    code: int
    output: str
    error: str


class SlurmEngine:
    """Implements `interfaces.cluster_engine.Engine` for the jobs of this process's user.

    Jobs of other users are ignored, even if they have the same name.
    """

    def __init__(self, settings: SlurmSettings) -> None:
        self._settings = settings
        self._locks = KeyedLock()
        self._slots = asyncio.Semaphore(CONCURRENT_COMMANDS_MAX)

    async def submit(self, request: JobRequest) -> None:
        """Look the name up, then call sbatch. Implements `Engine.submit`.

        An sbatch process that outlives its server may still submit a duplicate. Slurm does not start the duplicate
        while another job has the name, and `reconcile_jobs` cancels it.
        """
        excluded = await self._find_excluded_hosts(request)
        arguments, script = sbatch_arguments(request, self._settings, excluded), job_script(request)
        environment = sbatch_environment(request)
        async with self._locks.lock_for(request.name):
            status = (await self.reconcile_jobs([request.name]))[request.name]
            if status.phase is not JobPhase.UNKNOWN:
                return
            result = await self._run("sbatch", *arguments, environment=environment, stdin=script)
        if result.code == 0:
            return
        if any(text in result.error for text in _TEMPORARY_ERRORS):
            raise _unavailable("sbatch", result.error)
        raise EngineRejectedError(f"Slurm refuses the job: {result.error}. Change the request or [cluster.slurm].")

    async def _find_excluded_hosts(self, request: JobRequest) -> Sequence[str]:
        """Return the excluded hosts that exist in Slurm, which refuses jobs that exclude unknown hosts or all hosts."""
        if not request.excluded_hosts:
            return ()
        names = {host.name for host in await self.hosts()}
        excluded = sorted(names & {*request.excluded_hosts})
        if len(excluded) == len(names):
            raise EngineRejectedError("No host is left for the job: all hosts of the partition are excluded.")
        return excluded

    async def cancel(self, name: str) -> None:
        """Cancel all jobs with this name. Slurm waits `KillWait` before SIGKILL. Implements `Engine.cancel`."""
        check_job_name(name)
        result = await self._run("scancel", "--me", f"--name={name}")
        if result.code != 0:
            raise _unavailable("scancel", result.error)

    async def reconcile_jobs(self, names: Collection[str]) -> Mapping[str, JobStatus]:
        """Call squeue once for every NAMES_PER_COMMAND names. Implements `Engine.reconcile_jobs`."""
        statuses: dict[str, JobStatus] = {}
        for some in _batches(sorted(set(names)), NAMES_PER_COMMAND):
            queued = await self._query(some)
            statuses |= queued.statuses
            for name, job_ids in queued.waiting_duplicates.items():
                await self._cancel_waiting(name, job_ids)
        return statuses

    async def _query(self, names: Collection[str]) -> JobsSummary:
        for name in names:
            check_job_name(name)
        arguments = ("--me", "--noheader", "--states=all", f"--name={','.join(names)}", f"--Format={SQUEUE_FORMAT}")
        result = await self._run("squeue", *arguments)
        if result.code != 0:
            raise _unavailable("squeue", result.error)
        try:
            return summarize_jobs(names, parse_jobs(result.output))
        except UnexpectedOutputError as error:
            raise _unexpected("squeue", error) from error

    async def _cancel_waiting(self, name: str, job_ids: Collection[str]) -> None:
        """Cancel duplicates. The filters protect jobs with a reused id, and jobs that have started in the meantime."""
        _log.warning("cancelling duplicates of the job %s: %s", name, ", ".join(job_ids))
        try:
            result = await self._run("scancel", "--me", f"--name={name}", "--state=PENDING", *job_ids)
        except EngineUnavailableError as error:
            _log.warning("%s", error)
            return
        if result.code != 0:  # the duplicate has ended or started, or the next lookup tries again
            _log.info("scancel: %s", result.error)

    async def maximal_host_sizes(self) -> Sequence[Resources]:
        """Query the sizes of the partition's hosts. Implements `Engine.maximal_host_sizes`."""
        return await self._query_hosts(parse_largest_host_sizes, f"--format={SINFO_FORMAT}")

    async def hosts(self) -> Sequence[EngineHost]:
        """Query the hosts of the partition. Implements `Engine.hosts`."""
        return await self._query_hosts(parse_hosts, "--Node", f"--format={SINFO_HOST_FORMAT}")

    async def _query_hosts(
        self, parse: Callable[[str, str | None], Sequence[_Host]], *arguments: str
    ) -> Sequence[_Host]:
        """Call sinfo and parse its output. Raises EngineUnavailableError if it fails or lists no hosts."""
        partition = self._settings.partition
        selection = [f"--partition={partition}"] if partition else []
        result = await self._run("sinfo", "--noheader", "--exact", *arguments, *selection)
        if result.code != 0:
            raise _unavailable("sinfo", result.error)
        try:
            hosts = parse(result.output, partition)
        except UnexpectedOutputError as error:
            raise _unexpected("sinfo", error) from error
        if not hosts:
            name = f"The partition {partition}" if partition else "The default partition of Slurm"
            raise EngineUnavailableError(f"{name} does not exist or has no hosts; set cluster.slurm.partition.")
        return hosts

    async def _run(
        self, name: str, *arguments: str, environment: Mapping[str, str] | None = None, stdin: str = ""
    ) -> _CommandResult:
        """Run one of Slurm's commands. Raises EngineUnavailableError if it does not finish in time.

        environment: what sbatch passes on to the job.
        """
        program = shutil.which(name, path=self._settings.commands_dir or SYSTEM_PATH)
        if program is None:
            message = f"The command {name} is not installed; install Slurm's client, or set cluster.slurm.commands."
            raise EngineUnavailableError(message)
        variables = dict(environment or {})
        if self._settings.configuration_path:
            variables["SLURM_CONF"] = self._settings.configuration_path
        async with self._slots:
            return await _run_command(name, [program, *arguments], variables, stdin.encode())


async def _run_command(
    name: str, command: Sequence[str], environment: Mapping[str, str], stdin: bytes
) -> _CommandResult:
    """Run a command. Input and output are files in memory, not pipes, which another process could keep open."""
    with ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *_LIMIT_OUTPUT,
                *_DIE_WITH_PARENT,
                *command,
                stdin=files[0],
                stdout=files[1],
                stderr=files[2],
                env=environment,
                cwd="/",
            )
        except OSError as error:
            raise EngineUnavailableError(f"{name} cannot be started: {error.strerror}.") from error
        has_finished = await _wait(process)
        output, errors = (os.pread(file.fileno(), OUTPUT_BYTES_MAX, 0) for file in files[1:])
    if not has_finished:
        raise _unavailable(
            name, f"no response within {COMMAND_TIMEOUT_SECONDS:g} s; {_one_line(errors)}".removesuffix("; ")
        )
    if max(len(output), len(errors)) >= OUTPUT_BYTES_MAX:
        raise _unavailable(name, os.strerror(errno.EFBIG))
    code = process.returncode or 0
    return _CommandResult(code, output.decode(errors="replace"), _one_line(errors) or f"exit code {code}")


async def _wait(process: asyncio.subprocess.Process) -> bool:
    """Return whether the process ends in time. Kill it if it does not, or if the caller is cancelled."""
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
            await process.wait()
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _KILL_SECONDS)
    return True


def _one_line(text: bytes) -> str:
    words = " ".join(text[-4096:].decode(errors="replace").split())
    return replace_unprintable(words.removesuffix("."), replacement_character)[-_ERROR_CHARACTERS_MAX:]


def _unavailable(name: str, reason: str) -> EngineUnavailableError:
    return EngineUnavailableError(f"Slurm is not responding ({name}: {reason}); check slurmctld with 'scontrol ping'.")


def _unexpected(name: str, error: UnexpectedOutputError) -> EngineUnavailableError:
    return EngineUnavailableError(
        f"{name} printed output in an unknown format: {error}. Use a supported version of Slurm."
    )


def _batches(names: list[str], size: int) -> Iterator[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
