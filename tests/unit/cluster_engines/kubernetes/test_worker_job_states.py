"""Phases of jobs on Kubernetes."""

import msgspec
import pytest

from sandbox.cluster_engines.kubernetes.api import ApiJob, ApiPod
from sandbox.cluster_engines.kubernetes.worker_job import pod_phase, summarize_jobs
from sandbox.interfaces.cluster_engine import JobPhase, JobStatus

NAME = "sandbox-abcdefghij23"
ENDED = {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}
RUNNING = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}


def make_pod(name="p1", node="n1", phase="Running", container=RUNNING, job=NAME, deleted=False, deadline=600, **status):
    meta = {"name": name, "uid": name, "ownerReferences": [{"kind": "Job", "name": job, "controller": True}]}
    if deleted:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    statuses = [] if container is None else [{"name": "sidecar"}, {"name": "worker", **container}]
    pod = {
        "metadata": meta,
        "spec": {"nodeName": node, "activeDeadlineSeconds": deadline},
        "status": {"phase": phase, "containerStatuses": statuses, **status},
    }
    return msgspec.convert(pod, ApiPod)


def make_job(*conditions, name=NAME, deadline=None):
    job = {
        "metadata": {"name": name, "uid": "u"},
        "spec": {"activeDeadlineSeconds": deadline},
        "status": {"conditions": [{"type": each, "status": "True", "reason": "Why"} for each in conditions]},
    }
    return msgspec.convert(job, ApiJob)


def status_of(job, *pods):
    return summarize_jobs([NAME], [] if job is None else [job], pods)[NAME]


def disrupted(reason):
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "why"}]


@pytest.mark.parametrize(
    ("pod", "phase"),
    [
        (make_pod(node="", phase="Pending", container=None), JobPhase.WAITING),
        (make_pod(node="", phase="Failed", container=None), JobPhase.ENDED),
        (make_pod(phase="Pending", container=None), JobPhase.RUNNING),
        (make_pod(phase="Pending", container={"state": {"waiting": {"reason": "ErrImagePull"}}}), JobPhase.RUNNING),
        (make_pod(), JobPhase.RUNNING),
        (make_pod(phase="Unknown"), JobPhase.RUNNING),
        (make_pod(deleted=True), JobPhase.RUNNING),
        (make_pod(conditions=disrupted("EvictionByEvictionAPI")), JobPhase.RUNNING),
        (make_pod(conditions=disrupted("DeletionByTaintManager")), JobPhase.UNREACHABLE),
        (make_pod(conditions=disrupted("DeletionByPodGC"), phase="Failed"), JobPhase.UNREACHABLE),
        (make_pod(reason="NodeLost"), JobPhase.UNREACHABLE),
        (make_pod(conditions=disrupted("DeletionByPodGC")), JobPhase.UNREACHABLE),
        (make_pod(phase="Failed"), JobPhase.UNREACHABLE),
        (make_pod(phase="Failed", container=None, reason="Evicted"), JobPhase.UNREACHABLE),
        (make_pod(phase="Succeeded"), JobPhase.UNREACHABLE),
        (make_pod(phase="Succeeded", container=ENDED), JobPhase.ENDED),
        (make_pod(phase="Running", container=ENDED), JobPhase.ENDED),
        (make_pod(phase="Failed", container=ENDED, conditions=disrupted("DeletionByTaintManager")), JobPhase.ENDED),
        (
            make_pod(container={"state": {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}}),
            JobPhase.UNREACHABLE,
        ),
    ],
)
def test_pod_determines_the_phase(pod, phase):
    assert pod_phase(pod) is phase


def test_only_the_container_of_the_worker_counts():
    pod = msgspec.convert(
        {
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"nodeName": "n1"},
            "status": {"containerStatuses": [{"name": "sidecar", **ENDED}]},
        },
        ApiPod,
    )
    assert pod_phase(pod) is JobPhase.RUNNING


@pytest.mark.parametrize(
    ("job", "phase"),
    [
        (None, JobPhase.UNKNOWN),
        (make_job(), JobPhase.WAITING),
        (make_job("Suspended"), JobPhase.WAITING),
        (make_job(deadline=0), JobPhase.WAITING),
        (make_job("Failed", deadline=0), JobPhase.ENDED),
        (make_job("Failed"), JobPhase.UNREACHABLE),
        (make_job("Complete"), JobPhase.UNREACHABLE),
    ],
)
def test_job_determines_the_phase_if_it_has_no_pod(job, phase):
    """The deletion of a Job's Pod does not prove that the worker has ended."""
    status = status_of(job)
    assert (status.phase, status.host) == (phase, "")
    assert status.reason


def test_pod_on_a_node_takes_precedence_over_a_waiting_pod():
    waiting, running, ended = (
        make_pod("a", node="", phase="Pending", container=None),
        make_pod("c", node="n2"),
        make_pod("b", phase="Succeeded", container=ENDED),
    )
    status = status_of(make_job(), waiting, ended, running)
    assert status == JobStatus(JobPhase.RUNNING, "n2", "", "c", ("a",))
    assert status_of(make_job(), waiting, ended).phase is JobPhase.ENDED


@pytest.mark.parametrize(
    ("job", "pod", "is_ending"),
    [
        (make_job(), make_pod(), False),
        (None, make_pod(), False),
        (make_job("FailureTarget"), make_pod(), True),
        (make_job("SuccessCriteriaMet"), make_pod(), True),
        (make_job("Failed"), make_pod(), True),
        (make_job(deadline=0), make_pod(), True),
        (make_job(), make_pod(deleted=True), True),
        (make_job(), make_pod(deadline=1), True),
        (make_job("Complete"), make_pod(phase="Succeeded", container=ENDED), False),
    ],
)
def test_status_shows_whether_kubernetes_is_ending_the_worker(job, pod, is_ending):
    assert status_of(job, pod).is_ending == is_ending


def test_pods_of_other_jobs_are_ignored():
    assert status_of(make_job(), make_pod(job="sandbox-zzzzzzzzzzzz")).phase is JobPhase.WAITING


@pytest.mark.parametrize(
    ("terminated", "text"),
    [
        ({"exitCode": 0, "reason": "Completed"}, "The worker exited with 0 on n1 (Completed)."),
        ({"exitCode": 1}, "The worker exited with 1."),
        ({"exitCode": 143, "reason": "Error"}, "The worker was ended by signal 15 on n1 (Error)."),
        ({"exitCode": 137, "reason": "OOMKilled"}, "The worker was ended by signal 9 on n1 (OOMKilled)."),
        ({"exitCode": 255, "signal": 11}, "The worker was ended by signal 11."),
        ({"exitCode": 128}, "The worker exited with 128."),
        ({"exitCode": 129}, "The worker was ended by signal 1."),
        ({"exitCode": 159}, "The worker was ended by signal 31."),
        ({"exitCode": 160}, "The worker exited with 160."),
    ],
)
def test_reason_describes_the_end(terminated, text):
    assert status_of(make_job(), make_pod(container={"state": {"terminated": terminated}})).reason == text


def test_reason_is_bounded_and_printable():
    pod = make_pod(phase="Failed", container=None, reason="\x1b[2J" * 100, message="\n\u202e" * 10_000)
    reason = status_of(make_job(), pod).reason
    assert reason.isprintable()
    assert len(reason) < 500


def test_reason_contains_the_pod_reason():
    pod = make_pod(
        phase="Failed",
        container={"state": {"terminated": {"exitCode": 1, "reason": "Error"}}},
        reason="DeadlineExceeded",
    )
    assert status_of(make_job(), pod).reason == "The worker exited with 1 on n1 (Error, DeadlineExceeded)."


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (make_pod(node="", phase="Pending", container=None), "The Pod is waiting for a node."),
        (
            make_pod(
                node="", phase="Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "Gated"}]
            ),
            "The Pod is waiting for a node (Gated).",
        ),
        (make_pod(), ""),
        (make_pod(container={"state": {"waiting": {}}}), ""),
        (make_pod(container={"state": {"waiting": {"reason": "ContainerCreating"}}}), ""),
        (make_pod(container={"state": {"waiting": {"reason": "PodInitializing"}}}), ""),
        (
            make_pod(container={"state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}),
            "The worker cannot start on n1 yet (ErrImagePull: no such image).",
        ),
        (
            make_pod(conditions=disrupted("DeletionByPodGC"), phase="Failed"),
            "Kubernetes has given up on the Pod (DeletionByPodGC: why), but the node n1 has not confirmed that the "
            "worker ended.",
        ),
        (
            make_pod(phase="Failed", container=None, reason="Evicted", message="low on memory."),
            "Kubernetes has given up on the Pod (Evicted: low on memory), but the node n1 has not confirmed that the "
            "worker ended.",
        ),
        (
            make_pod(node="", phase="Failed", container=None, reason="Rejected"),
            "The Pod failed before it had a node (Rejected).",
        ),
    ],
)
def test_reason_describes_the_phase(pod, reason):
    assert status_of(make_job(), pod).reason == reason
