"""A server whose runtime does not work at its start finds out by itself when it does."""

import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from doubles import failing_probes
from doubles.live_server import make_repository, says, until
from sandbox.bootstrap.machine import choose_run_dir
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

TESTS = Path(__file__).parents[1]


@pytest.fixture
def machine(empty_world, monkeypatch, tmp_path):
    """Gives one whose probes fail so often, and counts them."""
    monkeypatch.setattr("doubles.live_server.COMMAND_LINE", "doubles.failing_probes:main")
    log = tmp_path / "probes"

    def make(failing, pause="5", **environment):
        make_repository(empty_world.repositories / "repo.git", {"README.md": "# Hi\n"})
        empty_world.start_git()
        empty_world.start_model(says())
        empty_world.count_probes = lambda: len(log.read_text().splitlines())
        empty_world.settings = {
            "PYTHONPATH": str(TESTS),
            "FAILING_PROBES_LOG": str(log),
            "FAILING_PROBES": failing,
            "FAILING_PROBES_PAUSE": pause,
            **environment,
        }
        empty_world.start_server(**empty_world.settings)
        return empty_world

    return make


def manifest(world, task_id="task-1"):
    return {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task", "id": task_id},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
    }


def test_a_runtime_that_fails_twice_is_probed_again_until_it_works(machine):
    world = machine("2", pause="0.5")
    refused = world.http.post("/api/v1/tasks", json=manifest(world))
    assert refused.status_code == 503
    assert failing_probes.WHY in refused.json()["message"]
    until(lambda: world.http.get("/api/v1/health/ready").status_code == 200, 20, "the server to be ready")
    assert world.count_probes() == 3
    health = world.http.get("/api/v1/health").json()
    assert (health["runtimes"][0]["works"], health["next_probe_at"], health["reasons"]) == (True, None, [])
    world.submit()
    status = world.wait()
    assert (status["state"], status["vm"]["tier"]) == ("completed", "namespaces")
    assert "The runtime bubblewrap works now" in world.server.log.read_text()
    assert world.count_probes() == 3


def test_a_runtime_that_works_at_once_is_probed_once(machine):
    world = machine("0", pause="0.1")
    time.sleep(1)
    assert world.http.get("/api/v1/health").json()["next_probe_at"] is None
    assert world.count_probes() == 1


def test_where_nothing_works_the_server_says_why_and_when_it_looks_again(machine):
    world = machine("always")
    health = world.http.get("/api/v1/health").json()
    at = datetime.fromisoformat(health["next_probe_at"])
    assert 0 < (at - datetime.now(UTC)).total_seconds() <= 5
    for answer in (world.http.get("/api/v1/health/ready"), world.http.post("/api/v1/tasks", json=manifest(world))):
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert "the next probe is at" in answer.json()["message"]
        assert failing_probes.WHY in answer.json()["message"]
    until(lambda: world.count_probes() == 2, 10, "the second probe")
    until(lambda: world.http.get("/api/v1/health").json()["next_probe_at"] is not None, 10, "the next plan")
    assert int(world.http.get("/api/v1/health/ready").headers["retry-after"]) > 5  # twice as long, less the jitter


def test_what_runs_goes_on_and_what_waits_begins_once_it_works(machine, tmp_path):
    """Both were taken by an earlier server, on which the runtime worked."""
    world = machine("0", SANDBOX_CAPACITY_CPUS="0.5")
    with world.model_held():
        world.submit("running", vm={"cpus": 1})
        world.until_state("running", "running")
        world.submit("waiting", vm={"cpus": 1})
        world.server.stop(signal.SIGKILL)
        (tmp_path / "probes").unlink()
        world.start_server(**world.settings | {"FAILING_PROBES": "2", "FAILING_PROBES_PAUSE": "2"})
        assert "No sandbox can be created; the next probe is at" in world.status("waiting")["state_message"]
    assert world.wait("running")["state"] == "completed"
    assert world.wait("waiting")["state"] == "completed"
    assert world.count_probes() == 3


def leaves_nothing(directory):
    probe_id = (directory / "made").read_text()
    assert probe_id not in BubblewrapRuntime(directory).attempt_ids()
    assert not (choose_run_dir(directory / "data") / f"probe-{probe_id}").exists()


def test_a_server_that_is_stopped_during_its_first_probe_ends_soon_and_leaves_nothing(machine, tmp_path, monkeypatch):
    monkeypatch.setattr("doubles.live_server.START_SECONDS", 3)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="did not start") as told:
        machine("0 hangs")
    assert time.monotonic() - began < 10
    assert "Stopped during the first probe of the runtimes" in str(told.value)
    leaves_nothing(tmp_path)


def test_a_server_that_is_stopped_during_a_later_probe_ends_soon_and_leaves_nothing(machine, tmp_path):
    world = machine("1 hangs", pause="0.2")
    until((tmp_path / "made").exists, 10, "the second probe to be under way")
    assert "a probe is under way" in world.http.get("/api/v1/health/ready").json()["message"]
    assert world.server.stop() < 5
    leaves_nothing(tmp_path)
