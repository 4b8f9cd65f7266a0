"""A server on which short tasks live while system calls fail, and the oracle that says whether anything went wrong."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import httpx

from doubles.faults import failed_calls, injected_fault
from doubles.leftovers import left_behind
from doubles.live_server import TERMINAL, World, make_repository, says, until
from doubles.stand_in_agent import make_stand_in
from sandbox.journal.extent import measure_extent

STEPS = [(json.dumps({"type": "assistant", "number": number}), 0.01) for number in range(5)]
FAULT_SECONDS = 4.0
"""So long after its first blow a fault is over, whatever has become of the task."""


class FaultHarness:
    """Tasks of a stand-in for the agent, one a fault. story: what became of each."""

    def __init__(self, directory, *, data_dir=None, steps=STEPS, **environment):
        self.world = World(directory)
        self.world.data_dir = data_dir or self.world.data_dir
        make_repository(self.world.repositories / "repo.git", {"README.md": "hello\n"})
        self.world.start_git()
        self.world.start_model(says())
        self.environment = {"PYTHONPATH": str(make_stand_in(self.world.directory / "agent", steps)), **environment}
        self.world.start_server(**self.environment)
        self.slowest_seconds = 0.0
        self.final_statuses = {}

    def close(self):
        self.world.close()

    def run_task(self, task_id, fault):
        """One task under one fault; gives how it ended and what was hit."""
        trace = self.world.directory / "trace.log"
        with self.monitored_health():
            with injected_fault(self.world.server.pid, fault, trace) as injection:
                is_taken = self.submit(task_id, FAULT_SECONDS)
                if is_taken:
                    self.wait_for_end(task_id, injection)
            assert is_taken or self.submit(task_id, 30), "refused though the fault is over"
            status = self.world.wait(task_id)
        self.check(status)
        return status, failed_calls(injection.hits)

    def wait_for_end(self, task_id, injection):
        """Until the task has ended, or the fault has gone on long enough."""
        begin = hit_at = time.monotonic()
        while self.state(task_id) not in TERMINAL and time.monotonic() - begin < 60:
            if not injection.hits:
                hit_at = time.monotonic()
            elif time.monotonic() - hit_at > FAULT_SECONDS:
                return
            time.sleep(0.1)

    def submit(self, task_id, seconds):
        """As any client would: what was refused for now is sent again. Whether it was taken in the end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.world.submit(task_id)
            except AssertionError as refusal:
                if "service_unavailable" not in str(refusal):
                    raise
                time.sleep(0.2)
            else:
                return True
        return False

    def state(self, task_id):
        return self.world.status(task_id).get("state")

    def check(self, status):
        """The end has a reason, and the journal is whole to its last byte and tells the same."""
        assert status["state"] in TERMINAL
        if status["state"] != "completed":
            assert status["error"]["code"], status
            assert status["error"]["message"], status
        records = self.world.data_dir / "tasks" / status["id"] / "journal" / "records"
        extent = measure_extent(records)
        assert extent.end == records.stat().st_size
        assert extent.last.transition.new_state == status["state"]
        self.final_statuses[status["id"]] = status

    def check_all(self):
        """A server that is killed and started again says the same of every task, and nothing is left behind."""
        until(lambda: not self.leftovers(), 20, f"everything to be gone: {self.leftovers()}")
        self.world.server.stop(9)
        self.world.start_server(**self.environment)
        for task_id, status in self.final_statuses.items():
            assert self.world.status(task_id) == status
        ran = subprocess.run(
            [sys.executable, "-m", "sandbox", "admin", "check", "--deep", "--data-dir", str(self.world.data_dir)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def leftovers(self):
        """What tasks left; runners tell of faults in their logs, and may."""
        found = left_behind(self.world.data_dir)
        found["files"] = {path for path in found.get("files", ()) if not path.endswith("runner.log")}
        return {kind: traces for kind, traces in found.items() if traces}

    @contextlib.contextmanager
    def monitored_health(self):
        """Ask again and again, and remember the slowest answer."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch_health, args=(over,))
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch_health(self, over):
        with httpx.Client(base_url=self.world.server.ready_message["http"], trust_env=False, timeout=30) as http:
            while not over.wait(0.25):
                begin = time.monotonic()
                status = http.get("/api/v1/health").status_code
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begin)
                if status != 200:
                    self.slowest_seconds = float("inf")


def journal_path(harness, task_id):
    return str(harness.world.data_dir / "tasks" / task_id / "journal" / "records")
