"""Brings a task into a state and keeps it there, with nothing in Sandbox to help: the world outside is slowed.

A clone is held by its network. The runner is stopped and let go on for two milliseconds at a time, until its journal
shows the state, and then for some more at random. A long state is met while it runs.
"""

import itertools
import time
from dataclasses import dataclass

from chaos import journal_file, processes
from chaos.machine import ALL_CPUS
from doubles.live_server import until
from doubles.runners import runner_of

REACH_SECONDS = 60.0
TRIES_MAX = 5
STEPS_MAX = 20
LINES_OF_LONG, LINES_OF_SHORT = 100_000, 500


@dataclass
class Held:
    """A task at its moment. runner: its pid where there is one; stopped: it stands still until `let_go`."""

    task_id: str
    state: str = ""
    runner: int | None = None
    is_stopped: bool = False
    valve: object = None
    seen: bytes = b""

    def let_go(self):
        if self.valve is not None:
            self.valve.open()
        if self.runner is not None and self.is_stopped:
            processes.go_on(self.runner)


class Moments:
    """Of one machine. chance: decides where in a state it is.

    is_endless: the agent in `running` would go on for long; retries: it may be followed by so many others.
    """

    def __init__(self, machine, chance, *, needs_sandbox=False, is_endless=False, retries=0):
        self._machine, self._chance = machine, chance
        self._needs_sandbox, self._is_endless, self._retries = needs_sandbox, is_endless, retries
        self.passed_by = []

    def reach(self, state, name):
        """Give a task in this state. The ones that passed it by are let go, and are bystanders."""
        for number in range(TRIES_MAX):
            task_id = f"{name}-{state}-{number}"
            held = getattr(self, f"_reach_{state}")(task_id, 0 if number else self._chance.randrange(STEPS_MAX))
            held.state = self._machine.state(task_id)
            if held.state == state:
                held.seen = journal_file.stdout_of(self._machine.records(task_id))
                return held
            held.let_go()
            self.passed_by.append(task_id)
        raise AssertionError(f"no task was met in {state}: {self._machine.tell(self.passed_by[-1])}")

    def _reach_pending(self, task_id, _):
        """Waiting for room, or acknowledged this very moment."""
        self._machine.order(task_id, cpus=ALL_CPUS)
        return Held(task_id)

    def _reach_staging(self, task_id, steps):
        """Somewhere between the runner's birth and the last byte of its clone."""
        valve, url = self._machine.add_valve(self._chance.randrange(10_000))
        self._machine.order(task_id, url=url)
        held = Held(task_id, valve=valve)
        if steps % 2 or self._machine.state(task_id) == "pending":
            until(lambda: valve.holds, REACH_SECONDS, "a clone that waits")
        held.runner = self._find_runner(task_id)
        return held

    def _reach_provisioning(self, task_id, steps):
        return self._step_into("provisioning", task_id, steps)

    def _reach_ready(self, task_id, steps):
        return self._step_into("ready", task_id, steps // 4)

    def _reach_running(self, task_id, steps):
        """While it prints."""
        lines = LINES_OF_LONG if self._is_endless else LINES_OF_SHORT
        self._machine.order(task_id, lines=lines, pause_seconds=0.01, retries=self._retries)
        self._await_state(task_id, "running")
        until(lambda: len(self._machine.records(task_id)) > 5 + 3 * steps, REACH_SECONDS, "some lines")
        return Held(task_id, runner=self._find_runner(task_id))

    def _reach_completing(self, task_id, steps):
        """While it stores many artifacts."""
        self._machine.order(task_id, lines=20, files=150, pause_seconds=0.02)
        self._await_state(task_id, "running")
        held = Held(task_id, runner=self._find_runner(task_id))
        while self._machine.state(task_id) == "running":
            time.sleep(0.001)
        held.is_stopped = processes.stop(held.runner)
        for _ in range(steps):
            held.is_stopped = processes.step(held.runner)
        return held

    def _step_into(self, state, task_id, steps):
        """From a held clone on, the runner gets no instant that is not watched."""
        valve, url = self._machine.add_valve(0)
        self._machine.order(task_id, url=url)
        until(lambda: valve.holds, REACH_SECONDS, "a clone that waits")
        held = Held(task_id, runner=self._find_runner(task_id), valve=valve)
        held.is_stopped = processes.stop(held.runner)
        valve.open()
        extra = itertools.count()
        deadline = time.monotonic() + REACH_SECONDS
        while held.is_stopped and time.monotonic() < deadline:
            records = self._machine.records(task_id)
            now = journal_file.state_of(records)
            if now == state and self._has_what_is_needed(records):
                if next(extra) >= steps:
                    break
            elif now not in ("staging", "provisioning"):
                break
            held.is_stopped = processes.step(held.runner)
        return held

    def _has_what_is_needed(self, records):
        return not self._needs_sandbox or bool(processes.members_of(journal_file.attempt_of(records)))

    def _await_state(self, task_id, state):
        until(lambda: self._machine.state(task_id) not in ("pending", "staging", "provisioning", "ready"),
              REACH_SECONDS, f"{task_id} to be {state}")  # fmt: skip

    def _find_runner(self, task_id):
        """None for one that has ended meanwhile."""
        until(lambda: self._machine.state(task_id) != "pending", REACH_SECONDS, "an attempt")
        deadline = time.monotonic() + REACH_SECONDS
        while (pid := runner_of(self._machine.data_dir, task_id)) is None:
            if self._machine.state(task_id) in journal_file.TERMINAL or time.monotonic() > deadline:
                return None
        return pid
