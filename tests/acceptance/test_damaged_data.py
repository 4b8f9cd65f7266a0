"""Whatever happens to the files of a data directory, a server starts on it, answers, and tells of the harm."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from doubles.live_server import says
from doubles.stored_tasks import KeptTasks

FINISHED = [f"task-{number}" for number in range(18)]
PATHS = ("", "/logs", "/logs?tail=5", "/logs?after=7", "/artifacts", "/artifacts/notes.txt", "/wait?timeout=0")
KEEP = {"SANDBOX_RETENTION_OLDER_THAN": "unlimited"}


def flip(chance, file):
    data = bytearray(file.read_bytes())
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(chance, file):
    os.truncate(file, chance.randrange(file.stat().st_size))


def remove(_, file):
    file.unlink()


def scribble(chance, file):
    with file.open("r+b") as opened:
        opened.seek(chance.randrange(file.stat().st_size))
        opened.write(chance.randbytes(chance.randrange(1, 3000)))


def append(chance, file):
    with file.open("ab") as opened:
        opened.write(chance.randbytes(100))


HARM = (flip, truncate, remove, scribble, append)


def harm(chance, kept):
    """Do something to the files of some tasks; gives which."""
    harmed = [*chance.sample(FINISHED, 10), "running", "waiting"]
    for task_id, do_harm in zip(harmed, itertools.cycle(HARM), strict=False):
        directory = kept.data_dir / "tasks" / task_id / "journal"
        [records] = [path for path in directory.iterdir() if path.name.startswith("records")]
        do_harm(chance, records)
    whole, directory = chance.sample([one for one in FINISHED if one not in harmed], 2), kept.data_dir / "tasks"
    shutil.rmtree(directory / whole[0])
    (directory / whole[1] / "journal" / "lock").unlink()
    return {*harmed, *whole}


@pytest.fixture
def kept(empty_world):
    made = KeptTasks(empty_world.data_dir)
    for number, task_id in enumerate(FINISHED):
        made.finish(task_id, lines=20 * number)
        if number % 2:
            made.journals.compress(task_id)
    made.run("running").writer.close()
    made.begin("waiting").writer.close()
    made.index()
    return made


def ask(world, path):
    """Every answer is whole, and none says that something went wrong inside."""
    answer = world.http.get(f"/api/v1/tasks{path}", timeout=60)
    assert answer.status_code < 500, (path, answer.text)
    return answer


def test_other_tasks_are_untouched(empty_world, kept):
    untold = {path.name: path for path in (kept.data_dir / "tasks").iterdir()}
    chance = random.Random(1)
    harmed = harm(chance, kept)
    empty_world.start_git()
    empty_world.start_model(says())
    empty_world.start_server(**KEEP)

    assert empty_world.http.get("/api/v1/health/ready").status_code == 200
    listed = {task["id"] for task in ask(empty_world, "?limit=100").json()["tasks"]}
    assert set(FINISHED) <= listed
    for task_id in untold:
        for path in PATHS:
            answer = ask(empty_world, f"/{task_id}{path}")
            if task_id in set(FINISHED) - harmed:
                assert answer.status_code == 200, (task_id, path, answer.text)
    for task_id in set(FINISHED) - harmed:
        lines = empty_world.logs(task_id, "stdout").splitlines()
        assert len(lines) == 20 * FINISHED.index(task_id)
        assert empty_world.frames(task_id)[-1]["type"] == "end"
        assert empty_world.artifact("notes.txt", task_id) == b"kept\n"
    found = {each["task_id"]: each["kind"] for each in check(empty_world)}
    assert set(found) <= harmed
    for task_id in {one for one, kind in found.items() if kind in {"journal_damaged", "journal_missing"}} & listed:
        told = empty_world.logs(task_id)
        assert "journal_damaged" in told or "Blocked" in empty_world.status(task_id)["state_message"], told
    assert empty_world.server.is_alive()


def test_damaged_rows_of_the_index_are_read_anew_at_the_start_and_told_of_beside_the_server(empty_world, kept):
    kept.damage_row("running")
    kept.damage_row("waiting", "state", "asleep")
    kept.damage_row("task-3", "task", b"\xff")
    empty_world.start_git()
    empty_world.start_model(says())
    empty_world.start_server(**KEEP)
    assert empty_world.http.get("/api/v1/health/ready").status_code == 200
    listed = {task["id"] for task in ask(empty_world, "?limit=100").json()["tasks"]}
    assert listed == {*FINISHED, "running", "waiting"}
    empty_world.wait("running")
    assert "task-3" not in {each["task_id"] for each in check(empty_world)}

    kept.damage_row("task-3")
    answer = empty_world.http.get("/api/v1/tasks/task-3")
    assert (answer.status_code, answer.json()["error"]) == (503, "service_unavailable")
    assert "sandbox admin rebuild" in answer.json()["message"]
    for query in ("?limit=100", "?limit=1&state=completed", "?label.none=x"):
        assert ask(empty_world, query).status_code == 200
    assert {task["id"] for task in ask(empty_world, "?limit=100").json()["tasks"]} == listed - {"task-3"}
    told = [finding for finding in check(empty_world) if finding["task_id"] == "task-3"]
    assert [finding["kind"] for finding in told] == ["index_differs"]
    assert "sandbox admin rebuild" in told[0]["message"]
    assert ask(empty_world, "/task-4").status_code == 200


def check(world):
    command = [sys.executable, "-m", "sandbox", "admin", "check", "--format", "json", "--data-dir", str(world.data_dir)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={"HOME": "/"})
    assert done.returncode in {0, 1}, done.stderr
    return json.loads(done.stdout)["findings"]
