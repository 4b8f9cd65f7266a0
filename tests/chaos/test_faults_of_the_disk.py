"""A disk that refuses what a task's life needs, now and then or for a while: the task ends, and nothing is torn.

`script/chaos-faults` plays every call; this is a sample of them.
"""

import dataclasses
import os
import time

import pytest

from doubles.faults import Fault, fill, small_file_system
from doubles.faulty_attempt import FaultyLife, journal_of
from doubles.live_server import TERMINAL, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root injects faults and mounts file systems")
HEALTH_SECONDS_MAX = 5.0  # 2 on a machine that does nothing else: docs/chaos.md


@pytest.fixture
def life(tmp_path):
    made = FaultyLife(tmp_path)
    yield made
    made.close()


def test_calls_that_fail_once_or_for_a_while_leave_whole_stories(life):
    for error, nth in (("ENOSPC", 1), ("EIO", 2), ("EINTR", 4)):
        _cost_nothing(life, f"journal-{error.lower()}-{nth}", Fault(error, nth), journal_of)
    _cost_nothing(life, "index-1", Fault("EIO", 1), lambda *_: str(life.world.data_dir / "index.sqlite-wal"))
    _cost_nothing(life, "a-while", Fault("ENOSPC", 6, goes_on=True), journal_of)
    assert life.world.logs("a-while", "stdout").count('"number"') == 5
    # Anywhere else they may end a task, with a reason.
    for error, nth in (("ENOSPC", 2), ("EIO", 11)):
        _, hits = life.live(f"anywhere-{error.lower()}-{nth}", Fault(error, nth))
        assert hits
    life.judge_all()
    assert life.slowest_seconds < HEALTH_SECONDS_MAX


def _cost_nothing(life, task_id, fault, path_of):
    status, hits = life.live(task_id, dataclasses.replace(fault, paths=(path_of(life, task_id),)))
    assert hits
    assert status["state"] == "completed", status


def test_a_task_whose_servers_disk_is_full_ends_once_there_is_room(tmp_path):
    steps = [('{"type": "assistant", "text": "' + "x" * 1000 + '"}', 0.02)] * 100
    with small_file_system(tmp_path / "small", 1024**3) as small:
        life = FaultyLife(tmp_path, data_dir=small / "data", steps=steps, SANDBOX_CAPACITY_DISK="1000")
        try:
            _play_full_disk(life, small)
        finally:
            life.close()


def _play_full_disk(life, small):
    world = life.world
    assert life.submit("task-1", 20)
    world.until_state("running")
    with life.watching_health():
        ballast = fill(small)
        until(lambda: world.http.get("/api/v1/health/ready").status_code == 503, 20, "readiness to be 503")
        assert "nearly full" in world.http.get("/api/v1/health/ready").json()["message"]
        until(lambda: "is nearly full" in world.logs("task-1", "events"), 30, "the gap")
        assert not life.submit("task-2", 1) or world.status("task-2")["state"] == "pending"
        is_late = time.monotonic() + 4
        while time.monotonic() < is_late:  # the agent's end comes while there is no room
            assert world.status("task-1")["state"] not in TERMINAL - {"completed"}, world.status("task-1")
            time.sleep(0.2)
        ballast.unlink()
        ended = world.wait("task-1")
    assert ended["state"] == "completed", ended
    life.judge(ended)
    assert "were dropped" in world.logs("task-1", "events")
    until(lambda: world.http.get("/api/v1/health/ready").status_code == 200, 20, "readiness")
    assert "task-2" in life.ends or life.submit("task-3", 20)
    for task in world.http.get("/api/v1/tasks").json()["tasks"]:
        life.judge(world.wait(task["id"]))
    life.judge_all()
    assert life.slowest_seconds < HEALTH_SECONDS_MAX
