"""The Job that runs a worker: its names, its labels, the objects that are sent to the API server, and its phase.

The phase of a job is determined from its Job and its Pods:

| Pod | phase |
| --- | --- |
| no node | waiting |
| on a node, and the worker's container is not terminated | running |
| the same, but Kubernetes has given up on the node, or the Pod has failed | unreachable |
| the node has reported that the worker's container terminated | ended |
| no Pod, and the Job is unfinished | waiting |
| no Pod, and the Job was cancelled | ended, without a host |
| no Pod, and the Job is finished | unreachable: the Pod was deleted |

Only the node's report proves that a worker has ended. The control plane itself deletes the Pods of a node that does not
respond, sets their phase to Failed, and lets their Job fail, although the workers may still be running there.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sandbox.cluster_engines import check_job_name
from sandbox.cluster_engines.kubernetes.api import WORKER_CONTAINER, ApiJob, ApiPod, one_line
from sandbox.interfaces.cluster_engine import (
    HOST_NAME_VARIABLE,
    IDENTITY_FILE_VARIABLE,
    JobPhase,
    JobRequest,
    JobStatus,
)

INSTANCE_LABEL = "app.kubernetes.io/instance"
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
    labels = server_labels(settings.owner)
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


def server_labels(owner: str) -> dict[str, str]:
    """Return the labels of a server's Jobs and Pods."""
    return {
        "app.kubernetes.io/name": "sandbox-worker",
        "app.kubernetes.io/managed-by": "sandbox",
        INSTANCE_LABEL: owner,
    }


def server_selector(owner: str) -> str:
    """Return the label selector of a server's Jobs and Pods."""
    return ",".join(f"{name}={value}" for name, value in server_labels(owner).items())


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


_LOST_CONTAINER = "ContainerStatusUnknown"
"""The termination reason of a container that its node no longer has. It does not prove that the container ended."""

_NODE_LOST_REASONS = frozenset({"DeletionByTaintManager", "DeletionByPodGC", "NodeLost"})
"""Reasons of a Pod or its condition DisruptionTarget that show that the control plane has given up on the node."""

_STARTING_REASONS = frozenset({"", "ContainerCreating", "PodInitializing"})
_FINISHED = ("Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")
_SIGNAL_CODES = range(129, 160)
"""Exit codes of containers that a signal ended: 128 plus the signal number."""


def pod_phase(pod: ApiPod) -> JobPhase:
    """Return the phase that a Pod shows; see the module's table."""
    terminated = pod.worker_state.terminated
    if terminated is not None and terminated.reason != _LOST_CONTAINER:
        return JobPhase.ENDED
    if not pod.spec.node_name:
        return JobPhase.ENDED if pod.status.phase == "Failed" else JobPhase.WAITING
    disruption = pod.status.find("DisruptionTarget")
    reasons = {pod.status.reason, "" if disruption is None else disruption.reason}
    if pod.status.phase in {"Failed", "Succeeded"} or terminated is not None or reasons & _NODE_LOST_REASONS:
        return JobPhase.UNREACHABLE
    return JobPhase.RUNNING


def summarize_jobs(names: Collection[str], jobs: Iterable[ApiJob], pods: Iterable[ApiPod]) -> Mapping[str, JobStatus]:
    """Return the status of each name."""
    jobs_by_name = {job.metadata.name: job for job in jobs}
    pods_by_name: dict[str, list[ApiPod]] = {}
    for pod in pods:
        pods_by_name.setdefault(pod.job, []).append(pod)
    return {name: _job_status(jobs_by_name.get(name), pods_by_name.get(name, [])) for name in names}


_RANKS = (JobPhase.RUNNING, JobPhase.UNREACHABLE, JobPhase.ENDED, JobPhase.WAITING)


def _job_status(job: ApiJob | None, pods: list[ApiPod]) -> JobStatus:
    """Return the status of a job. If it has two Pods, which is rare, a Pod on a node takes precedence."""
    if not pods:
        return _status_without_pod(job)
    first, *others = sorted(pods, key=lambda pod: (_RANKS.index(pod_phase(pod)), pod.metadata.name))
    phase = pod_phase(first)
    is_finished = job is not None and (job.was_cancelled_before_start or job.status.find(*_FINISHED) is not None)
    is_ending = is_finished or bool(first.metadata.deletion_timestamp) or first.spec.active_deadline_seconds == 1
    return JobStatus(
        phase,
        first.spec.node_name,
        _describe_pod(first, phase),
        first.metadata.name,
        tuple(pod.metadata.name for pod in others if pod_phase(pod) is not JobPhase.ENDED),
        is_ending=is_ending and phase is JobPhase.RUNNING,
    )


def _status_without_pod(job: ApiJob | None) -> JobStatus:
    if job is None:
        return JobStatus(JobPhase.UNKNOWN, reason="Kubernetes has no Job with this name.")
    name = job.metadata.name
    finished = job.status.find(*_FINISHED)
    if finished is None:
        advice = f"If this does not change, see the events in 'kubectl describe job {name}'."
        return JobStatus(JobPhase.WAITING, reason=f"Kubernetes has not created the Pod yet. {advice}", job_id=name)
    if job.was_cancelled_before_start:
        # A Pod may have been started at the same moment. ENDED without a host does not prove that its worker has ended.
        return JobStatus(JobPhase.ENDED, reason="The job was cancelled before it was started.", job_id=name)
    reason = f"The Pod was deleted, and no node has confirmed that the worker ended ({one_line(finished.reason)})."
    return JobStatus(JobPhase.UNREACHABLE, reason=reason, job_id=name)


def _describe_pod(pod: ApiPod, phase: JobPhase) -> str:
    """Return why a Pod is in its phase (human-readable)."""
    host, status = pod.spec.node_name, pod.status
    match phase:
        case JobPhase.WAITING:
            scheduled = next((each for each in status.conditions or () if each.type == "PodScheduled"), None)
            reason = "" if scheduled is None else one_line(scheduled.message or scheduled.reason)
            return f"The Pod is waiting for a node ({reason})." if reason else "The Pod is waiting for a node."
        case JobPhase.RUNNING:
            waiting = pod.worker_state.waiting
            if waiting is None or waiting.reason in _STARTING_REASONS:
                return ""
            return f"The worker cannot start on {host} yet ({_join(waiting.reason, waiting.message)})."
        case JobPhase.ENDED:
            return _describe_end(pod)
    disruption = status.find("DisruptionTarget")
    detail = _join(status.reason or status.phase, status.message)
    if disruption is not None:
        detail = _join(disruption.reason, disruption.message)
    message = f"Kubernetes has given up on the Pod ({detail}),"
    return f"{message} but the node {host} has not confirmed that the worker ended."


def _describe_end(pod: ApiPod) -> str:
    terminated = pod.worker_state.terminated
    if terminated is None:
        return f"The Pod failed before it had a node ({_join(pod.status.reason, pod.status.message)})."
    code = terminated.exit_code
    number = terminated.signal or (code - 128 if code in _SIGNAL_CODES else 0)
    how = f"was ended by signal {number}" if number else f"exited with {code}"
    reasons = dict.fromkeys(one_line(each) for each in (terminated.reason, pod.status.reason) if each)
    return f"The worker {how} on {pod.spec.node_name} ({', '.join(reasons)})." if reasons else f"The worker {how}."


def _join(reason: str, message: str) -> str:
    return one_line(": ".join(filter(None, (reason, message))))
