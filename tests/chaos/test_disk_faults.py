"""Tasks end with a consistent journal if disk operations fail once, or for some seconds.

This is a sample; `script/chaos-faults` makes every call fail.
"""

import dataclasses
import os
import time

import pytest

from doubles.deployment import FINAL_STATES, wait_until
from doubles.fault_harness import FaultHarness, journal_path
from doubles.syscall_faults import Fault, fill_file_system, small_file_system

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root injects faults and mounts file systems")
HEALTH_SECONDS_MAX = 5.0  # 2 s on an idle machine, see docs/chaos.md


@pytest.fixture
def harness(tmp_path):
    fault_harness = FaultHarness(tmp_path)
    yield fault_harness
    fault_harness.close()


def test_failing_system_calls_leave_consistent_journals(harness):
    for error, nth in (("ENOSPC", 1), ("EIO", 2), ("EINTR", 4)):
        _check_completes(harness, f"journal-{error.lower()}-{nth}", Fault(error, nth), journal_path)
    _check_completes(
        harness, "index-1", Fault("EIO", 1), lambda *_: str(harness.deployment.data_dir / "index.sqlite-wal")
    )
    _check_completes(harness, "a-while", Fault("ENOSPC", 6, is_persistent=True), journal_path)
    assert harness.deployment.logs("a-while", "stdout").count('"number"') == 5
    # If a call on any other file fails, the task may fail, but its journal must state the reason.
    for error, nth in (("ENOSPC", 2), ("EIO", 11)):
        _, hits = harness.run_task(f"anywhere-{error.lower()}-{nth}", Fault(error, nth))
        assert hits
    harness.check_after_restart()
    assert harness.slowest_seconds < HEALTH_SECONDS_MAX


def _check_completes(harness, task_id, fault, path_of):
    status, hits = harness.run_task(task_id, dataclasses.replace(fault, paths=(path_of(harness, task_id),)))
    assert hits
    assert status["state"] == "completed", status


def test_task_on_a_full_disk_completes_once_space_is_freed(tmp_path):
    timed_lines = [('{"type": "assistant", "text": "' + "x" * 1000 + '"}', 0.02)] * 100
    with small_file_system(tmp_path / "small", 1024**3) as small:
        harness = FaultHarness(tmp_path, data_dir=small / "data", timed_lines=timed_lines, SANDBOX_CAPACITY_DISK="1000")
        try:
            _run_on_full_disk(harness, small)
        finally:
            harness.close()


def _run_on_full_disk(harness, small):
    deployment = harness.deployment
    assert harness.submit("task-1", 20)
    deployment.wait_for_state("running")
    with harness.monitored_health():
        filler = fill_file_system(small)
        wait_until(lambda: deployment.http.get("/api/v1/health/ready").status_code == 503, 20, "readiness to be 503")
        assert "nearly full" in deployment.http.get("/api/v1/health/ready").json()["message"]
        wait_until(
            lambda: "is nearly full" in deployment.logs("task-1", "events"), 30, "the event that reports a full disk"
        )
        assert not harness.submit("task-2", 1) or deployment.status("task-2")["state"] == "pending"
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:  # the agent ends while the disk is full
            assert deployment.status("task-1")["state"] not in FINAL_STATES - {"completed"}, deployment.status("task-1")
            time.sleep(0.2)
        filler.unlink()
        ended = deployment.wait("task-1")
    assert ended["state"] == "completed", ended
    harness.check(ended)
    assert "were dropped" in deployment.logs("task-1", "events")
    wait_until(lambda: deployment.http.get("/api/v1/health/ready").status_code == 200, 20, "readiness")
    assert "task-2" in harness.final_statuses or harness.submit("task-3", 20)
    for task in deployment.http.get("/api/v1/tasks").json()["tasks"]:
        harness.check(deployment.wait(task["id"]))
    harness.check_after_restart()
    assert harness.slowest_seconds < HEALTH_SECONDS_MAX
