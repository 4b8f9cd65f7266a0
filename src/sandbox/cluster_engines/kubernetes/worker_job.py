"""The Job that runs a worker: its names and labels, and the objects that are sent to the API server."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sandbox.cluster_engines import check_job_name
from sandbox.cluster_engines.kubernetes.api_objects import WORKER_CONTAINER
from sandbox.interfaces.cluster_engine import HOST_NAME_VARIABLE, IDENTITY_FILE_VARIABLE, JobRequest

OWNER_LABEL = "app.kubernetes.io/instance"
"""The label with the id of the server that a Job belongs to: several servers may use a namespace."""

JOB_LABEL = "sandbox-job"
"""The label of a Pod with the name of its Job."""

JOB_TTL_SECONDS = 600
"""How long Kubernetes keeps an ended Job with its Pod. After that, the job is `UNKNOWN`."""

IMAGE_PULL_ALLOWANCE_SECONDS = 600
"""Additional time for pulling the image, because the time limit of a Pod begins before the image is pulled."""

DATA_DIR = "/var/lib/sandbox-worker"
"""The data directory of a worker in its container. It is removed with the Pod."""

_UID_LOCK_DIRECTORY = "/run/sandbox-uids"
"""The directory of the node in which all sandboxes of the node claim their kernel uids."""

_IDENTITY_DIR, _IDENTITY_FILE, _IDENTITY_SECONDS = "/var/run/secrets/sandbox", "token", 3600
_INT32_MAX = 2**31 - 1
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class WorkerPodSettings(NamedTuple):
    """What all Pods of workers have in common.

    image: the container image. service_account: the account of the workers; it needs no permissions.
    node_selector: labels of the nodes that run workers. tolerations: the keys of taints that the Pods tolerate.
    owner: the id of the server, a valid label. audience: the audience of the workers' identity tokens.
    """

    image: str
    service_account: str
    node_selector: Mapping[str, str]
    tolerations: Sequence[str]
    owner: str
    audience: str


def worker_job(request: JobRequest, settings: WorkerPodSettings, excluded_hosts: Sequence[str]) -> Mapping[str, Any]:
    """Return the Job. It has at most one Pod, which is never replaced. Raises ValueError.

    excluded_hosts: the names of nodes, which must be valid names.

    Everyone who may read Jobs or Pods can read the command and the environment, which therefore contain no secrets.
    """
    labels = owner_labels(settings.owner)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": check_job_name(request.name), "labels": labels},
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": JOB_TTL_SECONDS,
            "template": {
                "metadata": {"labels": {**labels, JOB_LABEL: request.name}},
                "spec": _pod_spec(request, settings, excluded_hosts),
            },
        },
    }


def owner_labels(owner: str) -> dict[str, str]:
    """Return the labels of a server's Jobs and Pods."""
    return {"app.kubernetes.io/name": "sandbox-worker", "app.kubernetes.io/managed-by": "sandbox", OWNER_LABEL: owner}


def owner_selector(owner: str) -> str:
    """Return the label selector of a server's Jobs and Pods."""
    return ",".join(f"{name}={value}" for name, value in owner_labels(owner).items())


def _pod_spec(request: JobRequest, settings: WorkerPodSettings, excluded_hosts: Sequence[str]) -> Mapping[str, Any]:
    """Return the specification of the Pod.

    The node itself enforces the time limit of a Pod, so the Pod remains with the worker's exit code. A Pod that is
    deleted would vanish without a proof that the worker has ended.
    """
    seconds = request.time_limit_seconds + IMAGE_PULL_ALLOWANCE_SECONDS
    return {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": min(max(seconds, 1), _INT32_MAX),
        "terminationGracePeriodSeconds": request.grace_seconds,
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [{"key": key, "operator": "Exists"} for key in settings.tolerations],
        **({"affinity": _exclude(excluded_hosts)} if excluded_hosts else {}),
        "containers": [_container(request, settings)],
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "uids", "hostPath": {"path": _UID_LOCK_DIRECTORY, "type": "DirectoryOrCreate"}},
            {
                "name": "identity",
                "projected": {
                    "sources": [
                        {
                            "serviceAccountToken": {
                                "audience": settings.audience,
                                "expirationSeconds": _IDENTITY_SECONDS,
                                "path": _IDENTITY_FILE,
                            }
                        }
                    ]
                },
            },
        ],
    }


def _exclude(hosts: Sequence[str]) -> Mapping[str, Any]:
    """Return the affinity that keeps a Pod off these nodes. Kubernetes allows only one name in each requirement."""
    names = [{"key": "metadata.name", "operator": "NotIn", "values": [host]} for host in hosts]
    return {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": names}]}
        }
    }


def _container(request: JobRequest, settings: WorkerPodSettings) -> Mapping[str, Any]:
    """Return the container. It is privileged, because sandboxes use namespaces, mounts, loop devices and cgroups."""
    limits = {
        "cpu": str(max(1, request.resources.cpus)),
        "memory": str(max(1, request.resources.memory_bytes)),
    }
    disk = {"ephemeral-storage": str(max(1, request.resources.disk_bytes))}
    return {
        "name": WORKER_CONTAINER,
        "image": settings.image,
        "command": [escape_references(each) for each in _command(request)],
        "env": [
            *({"name": name, "value": escape_references(value)} for name, value in _environment(request).items()),
            {"name": HOST_NAME_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": IDENTITY_FILE_VARIABLE, "value": f"{_IDENTITY_DIR}/{_IDENTITY_FILE}"},
        ],
        "resources": {"requests": {**limits, **disk}, "limits": limits},
        "securityContext": {"privileged": True},
        "volumeMounts": [
            {"name": "data", "mountPath": DATA_DIR},
            {"name": "uids", "mountPath": _UID_LOCK_DIRECTORY},
            {"name": "identity", "mountPath": _IDENTITY_DIR, "readOnly": True},
        ],
    }


def _command(request: JobRequest) -> Sequence[str]:
    """Return the command. Without an output file, Kubernetes keeps the output as the log of the Pod."""
    if not request.command or not Path(request.command[0]).is_absolute() or "\0" in "".join(request.command):
        raise ValueError("the worker's command must start with an absolute path and contain no NUL")
    if request.output_file == "/dev/null":
        return request.command
    if not Path(request.output_file).is_absolute() or "\0" in request.output_file:
        raise ValueError(f"the path of the output file must be absolute and contain no NUL: {request.output_file!r}")
    return ("/bin/sh", "-c", 'exec "$@" >>"$0" 2>&1', request.output_file, *request.command)


def _environment(request: JobRequest) -> Mapping[str, str]:
    for name, value in request.environment.items():
        is_reserved = name in {HOST_NAME_VARIABLE, IDENTITY_FILE_VARIABLE}
        if not _VARIABLE.fullmatch(name) or is_reserved or "\0" in value:
            raise ValueError(f"the worker's environment must not contain the variable {name!r}")
    return request.environment


def escape_references(text: str) -> str:
    """Escape text in which Kubernetes would replace `$(NAME)` with a variable's value, and `$$` with one `$`."""
    return text.replace("$", "$$")
