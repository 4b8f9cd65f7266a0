"""A server with a damaged data directory starts, responds, and reports the damage."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial

import pytest

from doubles.deployment import reply_turn, wait_until
from doubles.stored_tasks import StoredTasks

FINISHED = [f"task-{number}" for number in range(18)]
TASK_ROUTES = ("", "/logs", "/logs?tail=5", "/logs?after=7", "/artifacts", "/artifacts/notes.txt", "/wait?timeout=0")
UNLIMITED_RETENTION = {"SANDBOX_RETENTION_OLDER_THAN": "unlimited"}


def flip(rng, file):
    data = bytearray(file.read_bytes())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(rng, file):
    os.truncate(file, rng.randrange(file.stat().st_size))


def remove(_, file):
    file.unlink()


def overwrite(rng, file):
    with file.open("r+b") as opened:
        opened.seek(rng.randrange(file.stat().st_size))
        opened.write(rng.randbytes(rng.randrange(1, 3000)))


def append(rng, file):
    with file.open("ab") as opened:
        opened.write(rng.randbytes(100))


DAMAGES = (flip, truncate, remove, overwrite, append)


def damage(rng, tasks):
    """Damage the files of some tasks; return their ids."""
    damaged = [*rng.sample(FINISHED, 10), "running", "waiting"]
    for task_id, damage_task in zip(damaged, itertools.cycle(DAMAGES), strict=False):
        directory = tasks.data_dir / "tasks" / task_id / "journal"
        [records] = [path for path in directory.iterdir() if path.name.startswith("records")]
        damage_task(rng, records)
    others, directory = rng.sample([one for one in FINISHED if one not in damaged], 2), tasks.data_dir / "tasks"
    shutil.rmtree(directory / others[0])
    (directory / others[1] / "journal" / "lock").unlink()
    return {*damaged, *others}


@pytest.fixture
def tasks(deployment):
    tasks = StoredTasks(deployment.data_dir)
    for number, task_id in enumerate(FINISHED):
        tasks.add_completed_task(task_id, lines=20 * number)
        if number % 2:
            tasks.journals.compress(task_id)
    tasks.add_running_task("running").writer.close()
    tasks.add_task("waiting").writer.close()
    tasks.index()
    return tasks


def get(deployment, path):
    """Send a GET request; the response must not be a server error."""
    response = deployment.http.get(f"/api/v1/tasks{path}", timeout=60)
    assert response.status_code < 500, (path, response.text)
    return response


def reports_damage(deployment, task_id):
    """Return whether the logs or the state report the damage. Pending tasks are launched only after startup."""
    return "journal_damaged" in deployment.logs(task_id) or "Blocked" in deployment.status(task_id)["state_message"]


def test_undamaged_tasks_stay_readable(deployment, tasks):
    directories = {path.name: path for path in (tasks.data_dir / "tasks").iterdir()}
    rng = random.Random(1)
    damaged = damage(rng, tasks)
    deployment.start_git()
    deployment.start_model(reply_turn())
    deployment.start_server(**UNLIMITED_RETENTION)

    assert deployment.http.get("/api/v1/health/ready").status_code == 200
    listed = {task["id"] for task in get(deployment, "?limit=100").json()["tasks"]}
    assert set(FINISHED) <= listed
    for task_id in directories:
        for path in TASK_ROUTES:
            response = get(deployment, f"/{task_id}{path}")
            if task_id in set(FINISHED) - damaged:
                assert response.status_code == 200, (task_id, path, response.text)
    for task_id in set(FINISHED) - damaged:
        lines = deployment.logs(task_id, "stdout").splitlines()
        assert len(lines) == 20 * FINISHED.index(task_id)
        assert deployment.wire_events(task_id)[-1]["type"] == "end"
        assert deployment.artifact("notes.txt", task_id) == b"kept\n"
    found = {finding["task_id"]: finding["kind"] for finding in admin_check(deployment)}
    assert set(found) <= damaged
    for task_id in {one for one, kind in found.items() if kind in {"journal_damaged", "journal_missing"}} & listed:
        wait_until(partial(reports_damage, deployment, task_id), description=f"the report about {task_id}")
    assert deployment.server.is_alive()


def test_damaged_index_row_is_rebuilt_at_startup_and_reported_while_running(deployment, tasks):
    tasks.damage_row("running")
    tasks.damage_row("waiting", "state", "asleep")
    tasks.damage_row("task-3", "task", b"\xff")
    deployment.start_git()
    deployment.start_model(reply_turn())
    deployment.start_server(**UNLIMITED_RETENTION)
    assert deployment.http.get("/api/v1/health/ready").status_code == 200
    listed = {task["id"] for task in get(deployment, "?limit=100").json()["tasks"]}
    assert listed == {*FINISHED, "running", "waiting"}
    deployment.wait("running")
    assert "task-3" not in {finding["task_id"] for finding in admin_check(deployment)}

    tasks.damage_row("task-3")
    response = deployment.http.get("/api/v1/tasks/task-3")
    assert (response.status_code, response.json()["error"]) == (503, "service_unavailable")
    assert "sandbox admin rebuild" in response.json()["message"]
    for query in ("?limit=100", "?limit=1&state=completed", "?label.none=x"):
        assert get(deployment, query).status_code == 200
    assert {task["id"] for task in get(deployment, "?limit=100").json()["tasks"]} == listed - {"task-3"}
    findings = [finding for finding in admin_check(deployment) if finding["task_id"] == "task-3"]
    assert [finding["kind"] for finding in findings] == ["index_differs"]
    assert "sandbox admin rebuild" in findings[0]["message"]
    assert get(deployment, "/task-4").status_code == 200


def admin_check(deployment):
    command = [
        sys.executable,
        "-m",
        "sandbox",
        "admin",
        "check",
        "--format",
        "json",
        "--data-dir",
        str(deployment.data_dir),
    ]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={"HOME": "/"})
    assert done.returncode in {0, 1}, done.stderr
    return json.loads(done.stdout)["findings"]
