"""Determines the phase of a job from its Job and its Pods.

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

from collections.abc import Collection, Iterable, Mapping

from sandbox.cluster_engines.kubernetes.api_client import one_line
from sandbox.cluster_engines.kubernetes.api_objects import ApiJob, ApiPod
from sandbox.interfaces.cluster_engine import JobPhase, JobStatus

_LOST_CONTAINER = "ContainerStatusUnknown"
"""The reason of a container that its node no longer has, so it cannot have been observed to end."""

_NODE_LOST_REASONS = frozenset({"DeletionByTaintManager", "DeletionByPodGC", "NodeLost"})
"""Reasons of a Pod or its condition DisruptionTarget that show that the control plane has given up on the node."""

_STARTING_REASONS = frozenset({"", "ContainerCreating", "PodInitializing"})
_FINISHED = ("Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")
_SIGNAL_CODES = range(129, 160)
"""Exit codes of containers that ended by a signal: 128 and its number."""


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


def summarize(names: Collection[str], jobs: Iterable[ApiJob], pods: Iterable[ApiPod]) -> Mapping[str, JobStatus]:
    """Return the status of each name."""
    jobs_by_name = {job.metadata.name: job for job in jobs}
    pods_by_name: dict[str, list[ApiPod]] = {}
    for pod in pods:
        pods_by_name.setdefault(pod.job, []).append(pod)
    return {name: _status(jobs_by_name.get(name), pods_by_name.get(name, [])) for name in names}


_RANKS = (JobPhase.RUNNING, JobPhase.UNREACHABLE, JobPhase.ENDED, JobPhase.WAITING)


def _status(job: ApiJob | None, pods: list[ApiPod]) -> JobStatus:
    """Return the status of a job. If it has two Pods, which is rare, a Pod on a node takes precedence."""
    if not pods:
        return _status_without_pod(job)
    first, *others = sorted(pods, key=lambda pod: (_RANKS.index(pod_phase(pod)), pod.metadata.name))
    phase = pod_phase(first)
    is_finished = job is not None and (job.is_cancelled or job.status.find(*_FINISHED) is not None)
    is_ending = is_finished or bool(first.metadata.deletion_timestamp) or first.spec.active_deadline_seconds == 1
    return JobStatus(
        phase,
        first.spec.node_name,
        _describe(first, phase),
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
        advice = f"If this does not change, see the events of 'kubectl describe job {name}'."
        return JobStatus(JobPhase.WAITING, reason=f"Kubernetes has not created the Pod yet. {advice}", job_id=name)
    if job.is_cancelled:
        # A Pod may have been started at the same moment. ENDED without a host does not prove that its worker has ended.
        return JobStatus(JobPhase.ENDED, reason="The job was cancelled before it was started.", job_id=name)
    reason = f"The Pod was deleted, and no node has confirmed that the worker ended ({one_line(finished.reason)})."
    return JobStatus(JobPhase.UNREACHABLE, reason=reason, job_id=name)


def _describe(pod: ApiPod, phase: JobPhase) -> str:
    """Return why a Pod is in its phase (human-readable)."""
    host, status = pod.spec.node_name, pod.status
    match phase:
        case JobPhase.WAITING:
            scheduled = next((each for each in status.conditions or () if each.type == "PodScheduled"), None)
            reason = "" if scheduled is None else one_line(scheduled.message or scheduled.reason)
            return f"The Pod waits for a node ({reason})." if reason else "The Pod waits for a node."
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
    how = f"ended by signal {number}" if number else f"exited with {code}"
    reasons = dict.fromkeys(one_line(each) for each in (terminated.reason, pod.status.reason) if each)
    return f"The worker {how} on {pod.spec.node_name} ({', '.join(reasons)})." if reasons else f"The worker {how}."


def _join(reason: str, message: str) -> str:
    return one_line(": ".join(filter(None, (reason, message))))
