"""Runs tasks with the real Claude Code on three Slurm hosts, kills one host, cuts off another, checks the tasks.

Run as root with the project's Python: python bench/lost_hosts.py [--tasks 30] [--cpus 6] [--evidence DIRECTORY]

Needs Slurm (script/setup --cluster). The model is scripted. Every third task has no retries. The host that was cut off
is reconnected once the server has abandoned its attempts, while their successors are running. The checks:

- Each task reaches the final state that the documentation promises. A lost attempt is followed by one other attempt.
- What the server had acknowledged at the fault is unchanged at the end: the tasks, their records and their logs.
- Each patch contains what the agent wrote, and every artifact has its checksum.
- Once the model has received a request of an attempt, it receives none of an earlier attempt of that task.
- The model receives no request of a lost attempt later than one lease after the fault, even once the host is back.

The latest results are in docs/chaos.md. The exit code is 1 if a check fails.
"""

import argparse
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles import slurm_cluster
from doubles.deployment import FINAL_STATES, bash_turn, make_repository, reply_turn, wait_until
from doubles.slurm_deployment import LEASE_SECONDS, SMALL, SlurmDeployment
from sandbox.journal.journals import FileJournals
from sandbox.model.events import AgentExited, AgentStarted, AttemptStarted
from sandbox.placements.cluster.claim_and_takeover_rules import LEASE_MARGIN_SECONDS

STEPS, STEP_SECONDS = 6, 4
RUNNING_MIN, TOOL_CALLS_MIN = 3, 2
"""Before the fault, this many agents on each host must have made this many tool calls."""

END_SECONDS = 1800.0
GIVEN_UP_SECONDS = LEASE_SECONDS + LEASE_MARGIN_SECONDS + 300
LATE_SECONDS = 20.0
"""Minimum time for which the tasks continue after the host is reconnected."""

KILLED, CUT_OFF = "n1", "n2"


def turns():
    steps = [bash_turn(f"sleep {STEP_SECONDS}; echo {number} >> made.txt") for number in range(STEPS)]
    return [*steps, reply_turn()]


class Attempt:
    """An attempt in the journal.

    session_id: of its agent; None if it had not started. has_exited: the agent had finished its work. requests: when
    the model received them, in seconds since 1970.
    """

    def __init__(self, number, started):
        self.number, self.id, self.session_id = number, started.attempt_id, None
        self.host = started.host.rpartition(":")[2]
        self.has_exited, self.requests = False, []


class Experiment:
    """The tasks, the fault and the checks. violations: what is wrong."""

    def __init__(self, deployment, cluster, tasks):
        self.deployment, self.cluster = deployment, cluster
        self.retries = {f"task-{number:02}": int(number % 3 != 0) for number in range(1, tasks + 1)}
        self.before, self.logs_before, self.hosts_before, self.states_before = {}, {}, {}, {}
        self.lost_at = self.connected_at = None
        self.violations = []

    def run(self):
        deployment = self.deployment
        for task_id, retries in self.retries.items():
            deployment.submit(task_id, vm=SMALL, lifecycle={"retries": retries})
        wait_until(self._are_agents_running, 600, "agents on each host", pause_max=1)
        self._lose_hosts()
        self._connect_again()
        for task_id in self.retries:
            deployment.wait(task_id, END_SECONDS)
        time.sleep(max(0.0, self.connected_at + LATE_SECONDS - time.time()))
        self._check()

    def _are_agents_running(self):
        running = Counter()
        for task_id in self.retries:
            status = self.deployment.status(task_id)
            if status["state"] == "running" and status["progress"]["tool_calls"] >= TOOL_CALLS_MIN:
                running[status["host"]] += 1
        return all(running[host] >= RUNNING_MIN for host in slurm_cluster.HOSTS)

    def _lose_hosts(self):
        """Note what the server has acknowledged, then lose both hosts."""
        for task_id in self.retries:
            self.logs_before[task_id] = self.deployment.logs(task_id)
        for task_id in self.retries:
            self.before[task_id] = self._records(task_id)
            self.states_before[task_id] = self.deployment.status(task_id)["state"]
            attempts = self._attempts(task_id)
            self.hosts_before[task_id] = attempts[-1].host if attempts else ""
        self.cluster.kill_host(KILLED)
        self.cluster.cut_off(CUT_OFF)
        self.lost_at = time.time()

    def _connect_again(self):
        """Reconnect the host, while successors of the attempts that were lost on it are running."""
        lost = [task_id for task_id, host in self.hosts_before.items() if host in {KILLED, CUT_OFF}]
        retried = [task_id for task_id in lost if self.retries[task_id] and self.hosts_before[task_id] == CUT_OFF]

        def are_given_up():
            statuses = {task_id: self.deployment.status(task_id) for task_id in lost}
            attempts = {task_id: self._attempts(task_id) for task_id in retried}
            return all(status["attempts"][0]["error"] or _has_ended(status) for status in statuses.values()) and any(
                len(attempts[task_id]) > 1 and attempts[task_id][-1].session_id and not _has_ended(statuses[task_id])
                for task_id in retried
            )

        try:
            wait_until(are_given_up, GIVEN_UP_SECONDS, "successors of the lost attempts", pause_max=1)
        finally:
            self.cluster.reconnect(CUT_OFF)
            self.connected_at = time.time()

    def _records(self, task_id):
        return FileJournals(self.deployment.data_dir).read(task_id).records

    def _attempts(self, task_id):
        attempts = []
        for record in self._records(task_id):
            if isinstance(record.event, AttemptStarted):
                attempts.append(Attempt(len(attempts) + 1, record.event))
            elif isinstance(record.event, AgentStarted):
                attempts[-1].session_id = record.event.session_id
            elif isinstance(record.event, AgentExited):
                attempts[-1].has_exited = record.event.failure is None
        return attempts

    def _check(self):
        requests = [request for request in self.deployment.model_requests() if request["method"] == "POST"]
        self.rows, known = [], set()
        for task_id in self.retries:
            attempts, status = self._attempts(task_id), self.deployment.status(task_id)
            for attempt in attempts:
                if attempt.session_id is not None:
                    known.add(attempt.session_id)
                    attempt.requests = [each["received_at"] for each in requests if _has_session(each, attempt)]
            self._check_state(task_id, status, attempts)
            self._check_acknowledged(task_id)
            self._check_artifacts(task_id, status)
            self._check_requests(task_id, attempts)
            self.rows.append((task_id, status, attempts))
        unknown = [each for each in requests if not any(session in each["body"] for session in known)]
        if unknown:
            self.violations.append(f"{len(unknown)} requests belong to no attempt")
        listed = {task["id"] for task in self.deployment.http.get("/api/v1/tasks?limit=1000").json()["tasks"]}
        if missing := self.retries.keys() - listed:
            self.violations.append(f"the server has lost {sorted(missing)}")

    def _check_state(self, task_id, status, attempts):
        outcome = status["state"], (status["error"] or {}).get("code")
        is_lost = self.hosts_before[task_id] in {KILLED, CUT_OFF} and self.states_before[task_id] not in FINAL_STATES
        at_fault = sum(isinstance(record.event, AttemptStarted) for record in self.before[task_id])
        # The record of the start may have arrived after `before` was read.
        had_started = is_lost and attempts[at_fault - 1].session_id is not None
        was_completing = is_lost and attempts[at_fault - 1].has_exited
        lost_code = "host_lost"
        if not is_lost:
            expected = {("completed", None)}
        elif had_started and not self.retries[task_id]:
            # The results may have been collected before the fault.
            expected = {("failed", lost_code)} | ({("completed", None)} if was_completing else set())
        else:
            expected = {("completed", None)}
        if outcome not in expected:
            self.violations.append(f"{task_id} ended with {outcome} instead of {expected}: {status['error']}")
        errors = [(attempt["error"] or {}).get("code") for attempt in status["attempts"]]
        allowed = {(None,)} if not is_lost else {(lost_code,), (lost_code, None)}
        if was_completing:
            allowed |= {(None,)}
        if tuple(errors) not in allowed:
            self.violations.append(f"the attempts of {task_id} ended with {errors}")

    def _check_acknowledged(self, task_id):
        before = self.before[task_id]
        if self._records(task_id)[: len(before)] != before:
            self.violations.append(f"records of {task_id} have changed")
        if not self.deployment.logs(task_id).startswith(self.logs_before[task_id]):
            self.violations.append(f"the logs of {task_id} have changed")

    def _check_artifacts(self, task_id, status):
        listed = self.deployment.http.get(f"/api/v1/tasks/{task_id}/artifacts").json()["artifacts"]
        for artifact in listed:
            content = self.deployment.artifact(artifact["name"], task_id)
            if artifact["checksum"] != f"sha256:{hashlib.sha256(content).hexdigest()}":
                self.violations.append(f"{artifact['name']} of {task_id} is damaged")
        if status["state"] == "completed":
            patch = self.deployment.artifact(f"{task_id}.patch", task_id).decode()
            if [line for line in patch.splitlines() if line[:1] == "+"][1:] != [f"+{n}" for n in range(STEPS)]:
                self.violations.append(f"the patch of {task_id} is wrong: {patch}")

    def _check_requests(self, task_id, attempts):
        for earlier, later in itertools.pairwise(attempts):
            if later.requests and any(at >= later.requests[0] for at in earlier.requests):
                self.violations.append(f"two attempts of {task_id} used the model at the same time")
        for attempt in attempts:
            if self._was_lost(task_id, attempt) and any(at > self.lost_at + LEASE_SECONDS for at in attempt.requests):
                self.violations.append(f"{task_id} sent a request after the lease of attempt {attempt.number}")

    def _was_lost(self, task_id, attempt):
        ids = [record.event.attempt_id for record in self.before[task_id] if isinstance(record.event, AttemptStarted)]
        return (
            attempt.host in {KILLED, CUT_OFF}
            and attempt.id in ids
            and (self.states_before[task_id] not in FINAL_STATES)
        )

    def print_table(self):
        print("| task | retries | at the fault | attempts on | requests, last one after the fault | end |")
        print("| --- | --- | --- | --- | --- | --- |")
        for task_id, status, attempts in self.rows:
            requests = ", ".join(
                f"{len(attempt.requests)} ({attempt.requests[-1] - self.lost_at:+.0f} s)" if attempt.requests else "0"
                for attempt in attempts
            )
            end = (status["error"] or {}).get("code") or status["state"]
            at_fault = f"{self.states_before[task_id]} {self.hosts_before[task_id]}".rstrip()
            hosts = ", ".join(attempt.host for attempt in attempts)
            print(f"| {task_id} | {self.retries[task_id]} | {at_fault} | {hosts} | {requests} | {end} |")


def _has_ended(status):
    return status["state"] in FINAL_STATES


def _has_session(request, attempt):
    return attempt.session_id in request["body"]


def main():
    parser = argparse.ArgumentParser(description="Lose two of three hosts while Claude Code runs there.")
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--cpus", type=int, default=6, help="of each host; a task uses one")
    parser.add_argument("--evidence", type=Path, help="keep the model's requests, the journals and the logs here")
    options = parser.parse_args()
    if (reason := slurm_cluster.missing_requirement()) is not None:
        print(reason, file=sys.stderr)
        return 1
    started, load = time.monotonic(), os.getloadavg()
    with (
        tempfile.TemporaryDirectory(prefix="lost-hosts-") as directory,
        slurm_cluster.SlurmCluster(slurmd_timeout=60, cpus=options.cpus) as cluster,
    ):
        deployment = SlurmDeployment(directory, cluster)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
            deployment.start_git()
            deployment.start_model(*turns())
            deployment.start_server()
            experiment = Experiment(deployment, cluster, options.tasks)
            experiment.run()
        finally:
            deployment.close()
            if options.evidence is not None:
                _keep(deployment, cluster, options.evidence)
    end_load, seconds = os.getloadavg(), time.monotonic() - started
    print(
        f"{options.tasks} tasks, hosts with {options.cpus} CPUs, lease {LEASE_SECONDS} s, in {seconds:.0f} s; load "
        f"{load[0]:.0f} at the start, {end_load[0]:.0f} at the end, on {os.cpu_count()} CPUs."
    )
    connected = experiment.connected_at - experiment.lost_at
    print(f"{CUT_OFF} was connected again after {connected:.0f} s. {KILLED} was killed.\n")
    experiment.print_table()
    for violation in experiment.violations:
        print(f"VIOLATED: {violation}")
    print(f"\n{len(experiment.violations)} violations.")
    return int(bool(experiment.violations))


def _keep(deployment, cluster, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for path in [deployment.model_requests_file, *deployment.directory.glob("*.log")]:
        if path.exists():
            shutil.copy(path, directory)
    (directory / "slurm.txt").write_text(cluster.logs())
    shutil.copytree(deployment.data_dir / "tasks", directory / "tasks", dirs_exist_ok=True, symlinks=True)


if __name__ == "__main__":
    sys.exit(main())
