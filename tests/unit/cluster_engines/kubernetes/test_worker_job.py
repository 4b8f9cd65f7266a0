"""The Job of a worker."""

import pytest

from doubles.kubernetes.cluster import expand
from doubles.kubernetes.schemas import validate_job
from sandbox.cluster_engines.kubernetes.worker_job import (
    JOB_TTL_SECONDS,
    WorkerPodSettings,
    escape_references,
    server_selector,
    worker_job,
)
from sandbox.interfaces.cluster_engine import JobRequest
from sandbox.model.resources import Resources

SETTINGS = WorkerPodSettings("image:1", "sandbox-worker", {"pool": "agents"}, ("agents",), "ab" * 20, "audience")


def make_request(**changes):
    fields = {
        "name": "sandbox-abcdefghij23",
        "command": ("/bin/worker", "a"),
        "environment": {"A": "b"},
        "resources": Resources(2, 2**30, 2**33),
        "time_limit_seconds": 3600,
    }
    return JobRequest(**(fields | changes))


@pytest.mark.parametrize("text", ["", "$", "$$", "$(A)", "$$(A)", "$$$(A)", "a$(A)b$(", "$A ${A} $(B)", "%s\\", "é\n"])
def test_kubernetes_restores_escaped_text(text):
    assert expand(escape_references(text), {"A": "wrong"}) == text


def test_job_has_the_configured_scheduling_fields_and_labels():
    job = worker_job(make_request(), SETTINGS, ("n1", "n2.example"))
    validate_job(job)
    spec = job["spec"]["template"]["spec"]
    assert job["spec"]["ttlSecondsAfterFinished"] == JOB_TTL_SECONDS
    assert spec["nodeSelector"] == {"pool": "agents"}
    assert spec["tolerations"] == [{"key": "agents", "operator": "Exists"}]
    assert spec["serviceAccountName"] == "sandbox-worker"
    [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [field["values"] for field in term["matchFields"]] == [["n1"], ["n2.example"]]
    for each in server_selector("ab" * 20).split(","):
        name, value = each.split("=")
        assert job["metadata"]["labels"][name] == job["spec"]["template"]["metadata"]["labels"][name] == value


@pytest.mark.parametrize(("seconds", "expected"), [(0, 600), (3600, 4200), (2**31, 2**31 - 1)])
def test_time_limit_fits_the_field(seconds, expected):
    job = worker_job(make_request(time_limit_seconds=seconds), SETTINGS, ())
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == expected


def test_output_goes_to_the_pod_log_unless_a_file_is_configured():
    [container] = worker_job(make_request(), SETTINGS, ())["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/worker", "a"]
    request = make_request(output_file="/var/log/$(x)")
    [container] = worker_job(request, SETTINGS, ())["spec"]["template"]["spec"]["containers"]
    assert container["command"][-3:] == ["/var/log/$$(x)", "/bin/worker", "a"]


def test_job_contains_exactly_the_expected_fields():
    """Every change to the Job affects what runs with root privileges on the nodes."""
    labels = {
        "app.kubernetes.io/name": "sandbox-worker",
        "app.kubernetes.io/managed-by": "sandbox",
        "app.kubernetes.io/instance": "ab" * 20,
    }
    limits = {"cpu": "2", "memory": str(2**30)}
    token = {"audience": "audience", "expirationSeconds": 3600, "path": "token"}
    container = {
        "name": "worker",
        "image": "image:1",
        "command": ["/bin/worker", "a"],
        "env": [
            {"name": "A", "value": "b"},
            {"name": "SANDBOX_HOST_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "SANDBOX_IDENTITY_FILE", "value": "/var/run/secrets/sandbox/token"},
        ],
        "resources": {"requests": {**limits, "ephemeral-storage": str(2**33)}, "limits": limits},
        "securityContext": {"privileged": True},
        "volumeMounts": [
            {"name": "data", "mountPath": "/var/lib/sandbox-worker"},
            {"name": "uids", "mountPath": "/run/sandbox-uids"},
            {"name": "identity", "mountPath": "/var/run/secrets/sandbox", "readOnly": True},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": 4200,
        "terminationGracePeriodSeconds": 30,
        "serviceAccountName": "sandbox-worker",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": {"pool": "agents"},
        "tolerations": [{"key": "agents", "operator": "Exists"}],
        "containers": [container],
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "uids", "hostPath": {"path": "/run/sandbox-uids", "type": "DirectoryOrCreate"}},
            {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}},
        ],
    }
    template = {"metadata": {"labels": {**labels, "sandbox-job": "sandbox-abcdefghij23"}}, "spec": pod}
    spec = {"parallelism": 1, "completions": 1, "backoffLimit": 0, "ttlSecondsAfterFinished": 600, "template": template}
    meta = {"name": "sandbox-abcdefghij23", "labels": labels}
    assert worker_job(make_request(), SETTINGS, ()) == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": spec,
    }
