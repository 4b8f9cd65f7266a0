"""Software that queues and runs workers on a cluster: Slurm, Kubernetes, and a stand-in that starts local processes."""

import re

from sandbox.interfaces.cluster_engine import JOB_NAME_PATTERN

_JOB_NAME = re.compile(JOB_NAME_PATTERN)


def is_job_name(name: str) -> bool:
    """Return whether this is a valid job name. Names become parts of paths and of arguments."""
    return _JOB_NAME.fullmatch(name) is not None


def check_job_name(name: str) -> str:
    """Return the name. Raises ValueError if it is not a valid job name."""
    if not is_job_name(name):
        raise ValueError(f"not the name of a job: {name!r}")
    return name
