"""Tasks in Pods of a double of Kubernetes, with a real server, real runners and a scripted model."""

import json
import signal

import pytest

from doubles.deployment import SERVER_KEY, make_repository, reply_turn, wait_until
from doubles.kubernetes.deployment import SMALL, SandboxOnKubernetes
from doubles.remote_deployment import MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN


@pytest.fixture
def deployment(tmp_path):
    deployment = SandboxOnKubernetes(tmp_path)
    try:
        make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
        deployment.start_git()
        yield deployment
    finally:
        deployment.close()


def start(deployment, *turns):
    deployment.start_model(*turns)
    deployment.start_server()


@pytest.mark.timeout(240)
def test_task_runs_in_a_pod_that_contains_no_secret(deployment):
    start(deployment, MAKE_FILE_TURN, reply_turn())
    deployment.submit(vm=SMALL)
    job_id = wait_until(lambda: (deployment.status()["job"] or {}).get("id"), 60, description="the job")
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()
    assert status["host"] == "n1"
    assert b"+made\n" in deployment.artifact("task-1.patch")
    [started] = deployment.attempts()
    assert started.host == "cluster:n1"
    [pod] = deployment.pods()
    assert job_id == pod["metadata"]["name"]
    wait_until(lambda: pod["status"]["phase"] == "Succeeded", 30, description="the worker's end")
    stored = json.dumps([deployment.cluster.jobs, deployment.cluster.pods])
    assert SERVER_KEY not in stored
    assert "JOIN_TOKEN" not in stored
    assert not (deployment.cluster.volumes.path_of(pod) / "data" / "tasks" / "task-1").exists()


@pytest.mark.timeout(240)
def test_task_survives_a_killed_server_and_a_killed_worker(deployment):
    """The Pod survives the server. If the Pod is killed, Kubernetes confirms the end, and another Pod follows."""
    start(deployment, MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit(vm=SMALL, lifecycle={"retries": 1})
    deployment.wait_for_second_tool_call()
    [pod] = deployment.pods()
    ports = [deployment.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")]
    deployment.server.stop(signal.SIGKILL)
    deployment.start_server(ports=ports)
    assert deployment.pods() == [pod]
    wait_until(
        lambda: deployment.http.get("/api/v1/hosts").json()["hosts"][0]["state"] == "ready", 30, description="contact"
    )
    deployment.container_of(pod).kill("OOMKilled")
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 4, 60, description="the second attempt")
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert len(deployment.attempts()) == len(deployment.pods()) == 2


@pytest.mark.timeout(240)
def test_worker_whose_token_is_not_valid_gets_no_task(deployment):
    """A Pod of another server has a token for another audience."""
    issue_token = deployment.cluster.volumes.issue_token
    deployment.cluster.volumes.issue_token = lambda pod, audience: issue_token(pod, "another-server")
    start(deployment, MAKE_FILE_TURN, reply_turn())
    deployment.submit(vm=SMALL)
    reason = "token is not valid for this server"
    wait_until(lambda: reason in deployment.status()["state_message"], 60, description="the reason")
    assert deployment.attempts() == []
    deployment.cluster.volumes.issue_token = issue_token
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
