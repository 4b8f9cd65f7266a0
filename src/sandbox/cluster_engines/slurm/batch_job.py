"""The submission of a job to Slurm: the arguments of sbatch, and the job's script."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sandbox.cluster_engines import check_job_name
from sandbox.interfaces.cluster_engine import JobRequest

SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the signal up to this much earlier than requested (sbatch(1), --signal)."""

_MIB = 1024**2
_EXTRA_NAMES = (
    *("constraint", "exclude", "exclusive", "gres", "licenses", "nice", "nodelist", "qos", "reservation"),
    *("tmp", "wckey"),
)
"""The options that settings may contain. Others would change what the engine relies on."""

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
    """Settings of the engine `slurm`.

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

    excluded_hosts: the excluded hosts of the request that Slurm has. sbatch uses only the last option `--exclude`, so
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
