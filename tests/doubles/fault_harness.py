"""Runs short tasks on a server while system calls fail, and checks the outcome."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import httpx2

from doubles.deployment import FINAL_STATES, Deployment, make_repository, reply_turn, wait_until
from doubles.fake_agent import make_fake_agent
from doubles.leftovers import find_leftovers
from doubles.syscall_faults import failed_calls, injected_fault
from sandbox.journal.reader import find_journal_end

TIMED_LINES = [(json.dumps({"type": "assistant", "number": number}), 0.01) for number in range(5)]
FAULT_SECONDS = 4.0
"""The maximum duration of a fault, counted from its first hit. The fault also ends when the task ends."""


class FaultHarness:
    """Runs tasks with a fake agent, one task per fault. final_statuses: the tasks' final statuses, keyed by task id."""

    def __init__(self, directory, *, data_dir=None, timed_lines=TIMED_LINES, **environment):
        self.deployment = Deployment(directory)
        self.deployment.data_dir = data_dir or self.deployment.data_dir
        make_repository(self.deployment.repositories / "repo.git", {"README.md": "hello\n"})
        self.deployment.start_git()
        self.deployment.start_model(reply_turn())
        self.environment = {
            "PYTHONPATH": str(make_fake_agent(self.deployment.directory / "agent", timed_lines)),
            **environment,
        }
        self.deployment.start_server(**self.environment)
        self.slowest_seconds = 0.0
        self.final_statuses = {}

    def close(self):
        self.deployment.close()

    def run_task(self, task_id, fault):
        """Run a task with a fault; return its final status and the failed calls."""
        trace = self.deployment.directory / "trace.log"
        with self.monitored_health():
            with injected_fault(self.deployment.server.pid, fault, trace) as injection:
                is_accepted = self.submit(task_id, FAULT_SECONDS)
                if is_accepted:
                    self.wait_for_end(task_id, injection)
            assert is_accepted or self.submit(task_id, 30), "rejected although the fault has ended"
            status = self.deployment.wait(task_id)
        self.check(status)
        return status, failed_calls(injection.hits)

    def wait_for_end(self, task_id, injection):
        """Wait until the task has ended, or the fault has lasted FAULT_SECONDS."""
        start = first_hit_at = time.monotonic()
        while self.state(task_id) not in FINAL_STATES and time.monotonic() - start < 60:
            if not injection.hits:
                first_hit_at = time.monotonic()
            elif time.monotonic() - first_hit_at > FAULT_SECONDS:
                return
            time.sleep(0.1)

    def submit(self, task_id, seconds):
        """Submit a task, and retry if the status is 503. Return whether the task was accepted."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.deployment.submit(task_id)
            except AssertionError as rejection:
                if "service_unavailable" not in str(rejection):
                    raise
                time.sleep(0.2)
            else:
                return True
        return False

    def state(self, task_id):
        return self.deployment.status(task_id).get("state")

    def check(self, status):
        """Check that a failure has a reason, and that the journal is complete and has the same final state."""
        assert status["state"] in FINAL_STATES
        if status["state"] != "completed":
            assert status["error"]["code"], status
            assert status["error"]["message"], status
        records = self.deployment.data_dir / "tasks" / status["id"] / "journal" / "records"
        journal_end = find_journal_end(records)
        assert journal_end.end_offset == records.stat().st_size
        assert journal_end.last_record.transition.new_state == status["state"]
        self.final_statuses[status["id"]] = status

    def check_after_restart(self):
        """Check that a restarted server reports the same statuses, and that no leftovers remain."""
        wait_until(lambda: not self.leftovers(), 20, f"no leftovers: {self.leftovers()}")
        self.deployment.server.stop(9)
        self.deployment.start_server(**self.environment)
        for task_id, status in self.final_statuses.items():
            assert self.deployment.status(task_id) == status
        result = subprocess.run(
            [sys.executable, "-m", "sandbox", "admin", "check", "--deep", "--data-dir", str(self.deployment.data_dir)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def leftovers(self):
        """Return the leftovers of tasks, except for runner logs, which may report faults."""
        found = find_leftovers(self.deployment.data_dir)
        found["files"] = {path for path in found.get("files", ()) if not path.endswith("runner.log")}
        return {kind: items for kind, items in found.items() if items}

    @contextlib.contextmanager
    def monitored_health(self):
        """Poll the health endpoint while the block runs, and record the slowest response."""
        is_done = threading.Event()
        watcher = threading.Thread(target=self._watch_health, args=(is_done,))
        watcher.start()
        try:
            yield
        finally:
            is_done.set()
            watcher.join()

    def _watch_health(self, is_done):
        with httpx2.Client(base_url=self.deployment.server.ready_message["http"], trust_env=False, timeout=30) as http:
            while not is_done.wait(0.25):
                start = time.monotonic()
                status = http.get("/api/v1/health").status_code
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)
                if status != 200:
                    self.slowest_seconds = float("inf")


def journal_path(harness, task_id):
    return str(harness.deployment.data_dir / "tasks" / task_id / "journal" / "records")
