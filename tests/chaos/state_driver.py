"""Brings a task into a state and keeps it there without hooks in the product, by slowing down its environment.

A relay pauses the clone. The runner is stopped and resumed for two milliseconds at a time until its journal shows the
state, and then for a random number of further time slices. For a long state, waiting is sufficient.
"""

import itertools
import time
from dataclasses import dataclass

from chaos import journal_file, processes
from chaos.chaos_deployment import RESERVABLE_CPUS
from doubles.deployment import wait_until

REACH_TIMEOUT_SECONDS = 60.0
TRIES_MAX = 15
TIME_SLICES_MAX = 20
ENDLESS_LINE_COUNT, FEW_LINES_COUNT = 100_000, 500


@dataclass
class HeldTask:
    """A task held in a state. runner: pid of its runner, if any; is_stopped: whether it is stopped until `release`."""

    task_id: str
    state: str = ""
    runner: int | None = None
    is_stopped: bool = False
    relay: object = None
    stdout_before: bytes = b""

    def release(self):
        if self.relay is not None:
            self.relay.release()
        if self.runner is not None and self.is_stopped:
            processes.resume(self.runner)


class StateDriver:
    """Brings tasks of one deployment into states. rng: chooses the point within a state.

    is_endless: the agent stays in `running` for a long time; retries: `lifecycle.retries` of the task.
    """

    def __init__(self, deployment, rng, *, needs_sandbox=False, is_endless=False, retries=0):
        self._deployment, self._rng = deployment, rng
        self._needs_sandbox, self._is_endless, self._retries = needs_sandbox, is_endless, retries
        self.missed_task_ids = []

    def reach(self, state, name):
        """Return a task in this state. Tasks that missed the state are released and keep running."""
        for number in range(TRIES_MAX):
            task_id = f"{name}-{state}-{number}"
            held = getattr(self, f"_reach_{state}")(task_id, 0 if number else self._rng.randrange(TIME_SLICES_MAX))
            held.state = self._deployment.state(task_id)
            if held.state == state:
                held.stdout_before = journal_file.stdout_of(self._deployment.latest_records(task_id))
                return held
            held.release()
            self.missed_task_ids.append(task_id)
        raise AssertionError(f"no task was held in {state}: {self._deployment.diagnostics(self.missed_task_ids[-1])}")

    def _reach_pending(self, task_id, _):
        """Return a task that is waiting for capacity or has just been acknowledged."""
        self._deployment.submit_instructions(task_id, cpus=RESERVABLE_CPUS)
        return HeldTask(task_id)

    def _reach_staging(self, task_id, time_slices):
        """Return a task whose runner has started but has not yet received the last byte of its clone."""
        relay, url = self._deployment.add_pausing_relay(self._rng.randrange(10_000))
        self._deployment.submit_instructions(task_id, url=url)
        held = HeldTask(task_id, relay=relay)
        if time_slices % 2 or self._deployment.state(task_id) == "pending":
            wait_until(lambda: relay.is_holding, REACH_TIMEOUT_SECONDS, "a held clone")
        held.runner = self._find_runner(task_id)
        return held

    def _reach_provisioning(self, task_id, time_slices):
        return self._advance_into("provisioning", task_id, time_slices)

    def _reach_ready(self, task_id, time_slices):
        return self._advance_into("ready", task_id, time_slices // 4)

    def _reach_running(self, task_id, time_slices):
        """Return a task whose agent is printing lines."""
        self._deployment.submit_instructions(task_id, lines=self._lines(), pause_seconds=0.01, retries=self._retries)
        self._await_state(task_id, "running")
        wait_until(
            lambda: len(self._deployment.latest_records(task_id)) > 5 + 3 * time_slices,
            REACH_TIMEOUT_SECONDS,
            "some lines",
        )
        return HeldTask(task_id, runner=self._find_runner(task_id))

    def _lines(self):
        return ENDLESS_LINE_COUNT if self._is_endless else FEW_LINES_COUNT

    def _reach_completing(self, task_id, time_slices):
        """Return a task whose runner is storing many artifacts."""
        self._deployment.submit_instructions(task_id, lines=20, files=150, pause_seconds=0.02, retries=self._retries)
        self._await_state(task_id, "running")
        held = HeldTask(task_id, runner=self._find_runner(task_id))
        while self._deployment.state(task_id) == "running":
            time.sleep(0.001)
        held.is_stopped = processes.stop(held.runner)
        for _ in range(time_slices):
            held.is_stopped = processes.run_briefly(held.runner)
        return held

    def _advance_into(self, state, task_id, time_slices):
        """Pause the clone, then run the runner in time slices and check the state after each."""
        relay, url = self._deployment.add_pausing_relay(0)
        self._deployment.submit_instructions(task_id, url=url)
        wait_until(lambda: relay.is_holding, REACH_TIMEOUT_SECONDS, "a held clone")
        held = HeldTask(task_id, runner=self._find_runner(task_id), relay=relay)
        held.is_stopped = processes.stop(held.runner)
        relay.release()
        extra = itertools.count()
        deadline = time.monotonic() + REACH_TIMEOUT_SECONDS
        while held.is_stopped and time.monotonic() < deadline:
            records = self._deployment.latest_records(task_id)
            state_now = journal_file.state_of(records)
            if state_now == state and self._has_required_processes(records):
                if next(extra) >= time_slices:
                    break
            elif state_now not in ("staging", "provisioning"):
                break
            held.is_stopped = processes.run_briefly(held.runner)
        return held

    def _has_required_processes(self, records):
        return not self._needs_sandbox or bool(processes.members_of(journal_file.latest_attempt_id(records)))

    def _await_state(self, task_id, state):
        wait_until(lambda: self._deployment.state(task_id) not in ("pending", "staging", "provisioning", "ready"),
              REACH_TIMEOUT_SECONDS, f"{task_id} to be {state}")  # fmt: skip

    def _find_runner(self, task_id):
        """Return the pid of the runner, or None if the runner has already ended."""
        wait_until(lambda: self._deployment.state(task_id) != "pending", REACH_TIMEOUT_SECONDS, "an attempt")
        deadline = time.monotonic() + REACH_TIMEOUT_SECONDS
        while (pid := self._deployment.find_runner(task_id)) is None:
            if self._deployment.state(task_id) in journal_file.FINAL_STATES or time.monotonic() > deadline:
                return None
        return pid
