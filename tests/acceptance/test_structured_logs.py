"""With SANDBOX_LOG_FORMAT=json, a server and its runners log JSON lines with request, task and attempt ids."""

import json

import pytest

from doubles.deployment import SERVER_KEY, bash_turn, reply_turn, wait_until

VALUE = "a-secret-value-of-some-length"


def lines(path):
    """Parse all lines, each of which must be JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


LOGGING = {"SANDBOX_LOG_FORMAT": "json", "SANDBOX_LOG_LEVEL": "debug", "TOKEN": VALUE}


@pytest.fixture
def json_log_deployment(deploy):
    """A deployment whose server logs JSON and has a secret."""
    return deploy(bash_turn("echo $TOKEN"), reply_turn(), environment=LOGGING)


def test_log_lines_are_json_with_request_and_task_ids(json_log_deployment):
    secrets = [{"name": "TOKEN", "source": "env", "key": "TOKEN"}]
    json_log_deployment.http.headers["X-Request-Id"] = "from-the-client"
    task_id = json_log_deployment.submit(secrets=secrets)
    json_log_deployment.http.headers.pop("X-Request-Id")
    json_log_deployment.wait()
    error = json_log_deployment.http.get("/api/v1/tasks/nobody%0Aforged").json()
    json_log_deployment.http.get("/api/health")
    json_log_deployment.server.stop()
    log_lines = lines(json_log_deployment.directory / "server.log")
    assert all({"time", "level", "logger", "message"} <= set(line) for line in log_lines)

    accepted = next(line for line in log_lines if line["message"] == f"Task {task_id} was accepted")
    assert (accepted["request_id"], accepted["task_id"]) == ("from-the-client", task_id)
    response = next(line for line in log_lines if line.get("status") == 202)
    assert (response["request_id"], response["task_id"], response["path"]) == (
        "from-the-client", task_id, "/api/v1/tasks",
    )  # fmt: skip
    missing = next(line for line in log_lines if line.get("status") == 404)
    assert (missing["request_id"], missing["task_id"]) == (error["request_id"], "nobody\nforged")
    assert next(line for line in log_lines if line.get("path") == "/api/health")["level"] == "debug"

    states = [line for line in log_lines if line["logger"] == "sandbox.server.journal_tailer"]
    assert [line["state"] for line in states][-1] == "completed"
    assert {line["task_id"] for line in states} == {task_id}
    assert all("request_id" not in line for line in states)
    assert all("request_id" in line for line in log_lines if "status" in line)
    _check_runner_log(json_log_deployment, task_id)


def _check_runner_log(deployment, task_id):
    """Check that the runner's log has the same format, and that no log contains a secret."""
    (path,) = deployment.data_dir.glob(f"tasks/{task_id}/attempts/*/runner.log")
    log_lines = wait_until(
        lambda: [line for line in lines(path) if line["message"] == "The attempt has ended"] and lines(path)
    )
    assert {line["task_id"] for line in log_lines} == {task_id}
    assert {line["attempt_id"] for line in log_lines} == {path.parent.name}
    logs = path.read_text() + (deployment.directory / "server.log").read_text()
    assert VALUE not in logs
    assert SERVER_KEY not in logs
