"""What operators find in the logs of a server and its runners: whole lines, each with what it is about."""

import json

import pytest

from doubles.live_server import SERVER_KEY, bash, says, until

VALUE = "a-secret-value-of-some-length"


def lines(path):
    """Every line, for each must be JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


LOGGING = {"SANDBOX_LOG_FORMAT": "json", "SANDBOX_LOG_LEVEL": "debug", "TOKEN": VALUE}


@pytest.fixture
def logging_world(world):
    """A server that logs as JSON, and knows a secret."""
    return world(bash("echo $TOKEN"), says(), environment=LOGGING)


def test_every_line_is_json_and_leads_from_the_request_to_the_task_and_its_runner(logging_world):
    secrets = [{"name": "TOKEN", "source": "env", "key": "TOKEN"}]
    logging_world.http.headers["X-Request-Id"] = "from-the-client"
    task_id = logging_world.submit(secrets=secrets)
    logging_world.http.headers.pop("X-Request-Id")
    logging_world.wait()
    refused = logging_world.http.get("/api/v1/tasks/nobody%0Aforged").json()
    logging_world.http.get("/api/health")
    logging_world.server.stop()
    told = lines(logging_world.directory / "server.log")
    assert all({"time", "level", "logger", "message"} <= set(line) for line in told)

    accepted = next(line for line in told if line["message"] == f"Task {task_id} was accepted")
    assert (accepted["request_id"], accepted["task_id"]) == ("from-the-client", task_id)
    answered = next(line for line in told if line.get("status") == 202)
    assert (answered["request_id"], answered["task_id"], answered["path"]) == (
        "from-the-client", task_id, "/api/v1/tasks",
    )  # fmt: skip
    missing = next(line for line in told if line.get("status") == 404)
    assert (missing["request_id"], missing["task_id"]) == (refused["request_id"], "nobody\nforged")
    assert next(line for line in told if line.get("path") == "/api/health")["level"] == "debug"

    states = [line for line in told if line["logger"] == "sandbox.server.journal_tailer"]
    assert [line["state"] for line in states][-1] == "completed"
    assert {line["task_id"] for line in states} == {task_id}
    assert all("request_id" not in line for line in states)
    assert all("request_id" in line for line in told if "status" in line)
    _look_at_runner(logging_world, task_id)


def _look_at_runner(world, task_id):
    """Its own log: the same shape, and nothing that is secret."""
    (path,) = world.data_dir.glob(f"tasks/{task_id}/attempts/*/runner.log")
    told = until(lambda: [line for line in lines(path) if line["message"] == "The attempt has ended"] and lines(path))
    assert {line["task_id"] for line in told} == {task_id}
    assert {line["attempt_id"] for line in told} == {path.parent.name}
    everything = path.read_text() + (world.directory / "server.log").read_text()
    assert VALUE not in everything
    assert SERVER_KEY not in everything
