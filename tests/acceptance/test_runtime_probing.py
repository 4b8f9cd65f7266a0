"""A server whose runtime fails at startup probes the runtime until it works."""

import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from doubles import failing_probes
from doubles.deployment import make_repository, reply_turn, wait_until
from sandbox.bootstrap.private_directories import choose_run_dir
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

TESTS_DIRECTORY = Path(__file__).parents[1]


@pytest.fixture
def deploy(deployment, monkeypatch, tmp_path):
    """Starts a deployment with failing probes, which are counted."""
    monkeypatch.setattr("doubles.deployment.CLI_MAIN", "doubles.failing_probes:main")
    log = tmp_path / "probes"

    def make(failing, pause="5", **environment):
        make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
        deployment.start_git()
        deployment.start_model(reply_turn())
        deployment.count_probes = lambda: len(log.read_text().splitlines())
        deployment.settings = {
            "PYTHONPATH": str(TESTS_DIRECTORY),
            "FAILING_PROBES_LOG": str(log),
            "FAILING_PROBES": failing,
            "FAILING_PROBES_PAUSE": pause,
            **environment,
        }
        deployment.start_server(**deployment.settings)
        return deployment

    return make


def manifest(task_id="task-1"):
    return {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task", "id": task_id},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
    }


def test_failing_runtime_is_probed_until_it_works(deploy):
    deployment = deploy("2", pause="0.5")
    rejected = deployment.http.post("/api/v1/tasks", json=manifest())
    assert rejected.status_code == 503
    assert failing_probes.FAILURE_REASON in rejected.json()["message"]
    wait_until(lambda: deployment.http.get("/api/v1/health/ready").status_code == 200, 20, "the server to be ready")
    assert deployment.count_probes() == 3
    health = deployment.http.get("/api/v1/health").json()
    assert (health["runtimes"][0]["works"], health["next_probe_at"], health["reasons"]) == (True, None, [])
    deployment.submit()
    status = deployment.wait()
    assert (status["state"], status["vm"]["tier"]) == ("completed", "namespaces")
    assert "The runtime bubblewrap works now" in deployment.server.log.read_text()
    assert deployment.count_probes() == 3


def test_working_runtime_is_probed_once(deploy):
    deployment = deploy("0", pause="0.1")
    time.sleep(1)
    assert deployment.http.get("/api/v1/health").json()["next_probe_at"] is None
    assert deployment.count_probes() == 1


def test_failing_runtime_reports_reason_and_next_probe(deploy):
    deployment = deploy("always")
    health = deployment.http.get("/api/v1/health").json()
    at = datetime.fromisoformat(health["next_probe_at"])
    assert 0 < (at - datetime.now(UTC)).total_seconds() <= 5
    for response in (
        deployment.http.get("/api/v1/health/ready"),
        deployment.http.post("/api/v1/tasks", json=manifest()),
    ):
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 5
        assert "the next probe is at" in response.json()["message"]
        assert failing_probes.FAILURE_REASON in response.json()["message"]
    wait_until(lambda: deployment.count_probes() == 2, 10, "the second probe")
    wait_until(
        lambda: deployment.http.get("/api/v1/health").json()["next_probe_at"] is not None,
        10,
        "the next probe to be scheduled",
    )
    # The pause has doubled, minus some jitter.
    assert int(deployment.http.get("/api/v1/health/ready").headers["retry-after"]) > 5


def test_running_task_continues_and_pending_task_starts_after_recovery(deploy, tmp_path):
    """Both tasks were accepted by an earlier server, whose runtime worked."""
    deployment = deploy("0", SANDBOX_CAPACITY_CPUS="0.5")
    with deployment.paused_model():
        deployment.submit("running", vm={"cpus": 1})
        deployment.wait_for_state("running", "running")
        deployment.submit("waiting", vm={"cpus": 1})
        deployment.server.stop(signal.SIGKILL)
        (tmp_path / "probes").unlink()
        deployment.start_server(**deployment.settings | {"FAILING_PROBES": "2", "FAILING_PROBES_PAUSE": "2"})
        assert "No sandbox can be created; the next probe is at" in deployment.status("waiting")["state_message"]
    assert deployment.wait("running")["state"] == "completed"
    assert deployment.wait("waiting")["state"] == "completed"
    assert deployment.count_probes() == 3


def check_no_leftovers(directory):
    probe_id = (directory / "made").read_text()
    assert probe_id not in BubblewrapRuntime(directory).attempt_ids()
    assert not (choose_run_dir(directory / "data") / f"probe-{probe_id}").exists()


def test_shutdown_during_the_first_probe_leaves_nothing_behind(deploy, tmp_path, monkeypatch):
    monkeypatch.setattr("doubles.deployment.START_SECONDS", 3)
    started_at = time.monotonic()
    with pytest.raises(AssertionError, match="did not start") as error:
        deploy("0 hangs")
    assert time.monotonic() - started_at < 10
    assert "The server was stopped before it was ready" in str(error.value)
    check_no_leftovers(tmp_path)


def test_shutdown_during_a_later_probe_leaves_nothing_behind(deploy, tmp_path):
    deployment = deploy("1 hangs", pause="0.2")
    wait_until((tmp_path / "made").exists, 10, "the second probe to run")
    assert "a probe is running" in deployment.http.get("/api/v1/health/ready").json()["message"]
    assert deployment.server.stop() < 5
    check_no_leftovers(tmp_path)
