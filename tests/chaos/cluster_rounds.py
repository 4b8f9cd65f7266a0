"""Rounds on the hosts of a Slurm cluster: kill, pause and cut off what runs there, and check the outcome.

A batch brings its tasks into states, and then applies its faults at the same time.
"""

import contextlib
import itertools
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from chaos import journal_file, processes
from chaos.cluster_deployment import ClusterChaosDeployment
from chaos.evidence_collection import collect_evidence
from chaos.oracle import CLUSTER_OUTCOMES, STATES, evaluate
from chaos.rounds import RoundResult
from chaos.state_driver import ENDLESS_LINE_COUNT, HeldTask, StateDriver
from doubles.deployment import wait_until
from doubles.slurm_cluster import HOSTS, SlurmCluster
from doubles.slurm_deployment import LEASE_SECONDS
from sandbox.placements.cluster.claim_and_takeover_rules import LEASE_MARGIN_SECONDS

PAUSE_SECONDS = 8.0
"""Shorter than the lease."""

MANY_LINES_COUNT = 2000
"""Number of lines at which the agent is still running at the fault, but completes in time afterwards."""

TASK_TARGETS = ("runner", "sandbox", "gateway", "worker", "paused runner", "paused sandbox", "paused worker")
LOST_HOST_TARGETS = ("host", "cut link", "stopped host")
BRIEF_HOST_TARGETS = ("paused host", "interrupted link")
SHARED_TARGETS = ("server", "paused server", "controller", "paused controller")
CLUSTER_BATCHES = (("tasks", "brief hosts"), ("stopped workers", "lost hosts"), SHARED_TARGETS)
"""The batches of a round, in groups. The batches of a group share a cluster and a server."""

_TAKEOVER_SECONDS = LEASE_SECONDS + LEASE_MARGIN_SECONDS + 60
_ENDLESS_AGENT_TARGETS = {"runner", "sandbox", "worker", "stopped worker", *LOST_HOST_TARGETS}
"""The kill targets whose agents must not end before the fault."""


def create_cluster():
    """Return a cluster whose hosts have room for a task in each state. It tolerates a busy machine."""
    return SlurmCluster(slurmd_timeout=60, cpus=10)


class _ClusterStateDriver(StateDriver):
    def _reach_pending(self, task_id, _):
        """Return a task whose job is waiting, because no host starts jobs."""
        self._deployment.submit_instructions(task_id)
        return HeldTask(task_id)

    def _lines(self):
        return ENDLESS_LINE_COUNT if self._is_endless else MANY_LINES_COUNT


def task_faults(targets):
    """Return the faults of single tasks, each as (target, state, retries)."""
    if not processes.can_destroy_sockets():
        targets = [target for target in targets if target != "gateway"]
    faults = [(target, state, 0) for target in targets for state in CLUSTER_OUTCOMES[target] if state != "pending"]
    retried = [("runner", "running"), *itertools.product(("worker", "stopped worker"), ("running", "completing"))]
    return faults + [(target, state, 1) for target, state in retried if target in targets]


def run_cluster_round(directory, cluster, batches, seed):
    """Run the batches one after the other with one deployment. A batch is a name or a list of `task_faults`."""
    with ClusterChaosDeployment(directory, cluster) as deployment:
        cluster_round = _ClusterRound(deployment, seed)
        for batch in batches:
            cluster_round.run(batch)
        evidence = cluster_round.collect_evidence()
    outcomes = Counter((task.target, task.state_at_kill, task.outcome) for task in evidence.tasks if task.target)
    return RoundResult(outcomes, evaluate(evidence))


class _ClusterRound:
    """Applies the faults of a round.

    kills: see `collect_evidence`. given_up: the agent session of each model request that had arrived when the task's
    attempt was given up, keyed by task id.
    """

    def __init__(self, deployment, seed):
        self._deployment, self._cluster, self._seed = deployment, deployment.cluster, seed
        self._rng = random.Random(f"{seed}")
        self.kills, self.given_up, self._sessions, self._attempts = {}, {}, {}, {}
        self._held = []

    def run(self, batch):
        self._held = []
        try:
            if not isinstance(batch, str):
                self._apply_task_faults(batch)
            elif batch == "tasks":
                self._apply_task_faults(task_faults(TASK_TARGETS))
            elif batch == "stopped workers":
                self._apply_task_faults(task_faults(["stopped worker"]))
            elif batch == "lost hosts":
                self._lose_hosts()
            elif batch == "brief hosts":
                self._interrupt_hosts()
            else:
                self._fault_all(batch)
        finally:
            self._cluster.restrict_to(*HOSTS)
            self._release()
        self._deployment.wait_for_all()

    def collect_evidence(self):
        deployment = self._deployment
        deployment.wait_for_all()
        deployment.sweep()
        deployment.wait_for_workers()
        evidence = collect_evidence(deployment, self.kills)
        for task in evidence.tasks:
            earlier = self.given_up.get(task.task_id, [])
            task.late_requests = sum(task.agent_sessions.count(one) - earlier.count(one) for one in set(earlier))
        return evidence

    def _release(self):
        for task in self._held:
            task.release()

    def _apply_task_faults(self, faults):
        """Apply each fault to one task."""
        faults = self._rng.sample(faults, len(faults))
        with ThreadPoolExecutor(5) as pool:
            tasks = list(pool.map(lambda fault: self._apply_task_fault(*fault), faults))
        for task in filter(None, tasks):
            self._wait_until_given_up(task)

    def _apply_task_fault(self, target, state, retries):
        """Apply the fault to one task. Return the task if its attempt must be given up."""
        task, rng = self._reach(target, state, retries)
        runner, attempt_id = task.runner, journal_file.latest_attempt_id(self._records(task))
        worker, members = self._deployment.worker_of(task.task_id), processes.members_of(attempt_id)
        self._note(target, task)
        match target:
            case "runner":
                processes.kill(runner)
            case "worker":
                processes.kill(worker)
            case "sandbox":
                processes.kill(rng.choice([members[0], processes.init_of(attempt_id) or members[0]]))
            case "gateway":
                processes.destroy_sockets(members[0])
            case "stopped worker":
                processes.stop(worker)
            case _:
                pids = {"paused runner": [runner], "paused worker": [worker], "paused sandbox": members}[target]
                self._pause(pids)
        task.release()
        return task if target == "stopped worker" else None

    @staticmethod
    def _pause(pids):
        for pid in pids:
            processes.stop(pid)
        time.sleep(PAUSE_SECONDS)
        for pid in pids:
            processes.resume(pid)

    def _reach(self, target, state, retries=0):
        """Return a task in the state, and a generator of random numbers for this task."""
        name = target.replace(" ", "-") + (f"-{retries}" if retries else "")
        rng = random.Random(f"{self._seed} {name} {state}")
        driver = _ClusterStateDriver(
            self._deployment,
            rng,
            needs_sandbox=target in {"sandbox", "gateway", "paused sandbox"},
            is_endless=target in _ENDLESS_AGENT_TARGETS and not retries,
            retries=retries,
        )
        task = driver.reach(state, name)
        self._held.append(task)
        return task, rng

    def _records(self, task):
        return self._deployment.latest_records(task.task_id)

    def _note(self, target, *tasks):
        """Note the state of the tasks, directly before the fault."""
        for task in tasks:
            task_id, records = task.task_id, self._deployment.records(task.task_id)
            self._sessions[task_id] = set(self._deployment.agent_sessions(task_id))
            self._attempts[task_id] = journal_file.latest_attempt_id(records)
            state = self._deployment.state(task_id)
            if state in STATES:
                self.kills[task_id] = (target, state, journal_file.stdout_of(records))

    def _reach_on_hosts(self, by_target):
        """Return tasks in all states on each host, keyed by target. by_target: the host of each target."""
        tasks = {target: [] for target in by_target}
        # The runners of running tasks are not stopped. Start these tasks last, because they could end too early.
        for are_running in (False, True):
            for target, host in by_target.items():
                self._cluster.restrict_to(host)
                states = [state for state in CLUSTER_OUTCOMES[target] if state not in ("pending", "running")]
                pairs = [("running", 0), *([("running", 1)] if target in LOST_HOST_TARGETS else [])]
                pairs = pairs if are_running else [(state, 0) for state in states]
                with ThreadPoolExecutor(5) as pool:
                    reached = [pool.submit(self._reach, target, *pair) for pair in pairs]
                tasks[target] += [future.result()[0] for future in reached]
        for target, held in tasks.items():
            self._note(target, *held)
        return tasks

    def _lose_hosts(self):
        """Lose three hosts in three ways at the same time; repair the first one immediately."""
        by_target = dict(zip(LOST_HOST_TARGETS, self._rng.sample(HOSTS, 3), strict=True))
        tasks = self._reach_on_hosts(by_target)
        self._cluster.kill_host(by_target["host"])
        self._cluster.cut_off(by_target["cut link"])
        stopped = processes.stop_all(self._cluster.host_pids()[by_target["stopped host"]])
        # Runners on the stopped host must not be resumed.
        for task in [*tasks["host"], *tasks["cut link"]]:
            task.release()
        try:
            self._cluster.restrict_to(*HOSTS)
            self._cluster.start_host(by_target["host"])
            for task in [one for held in tasks.values() for one in held]:
                self._wait_until_given_up(task)
        finally:
            self._cluster.reconnect(by_target["cut link"])
            for pid in stopped:
                processes.resume(pid)

    def _wait_until_given_up(self, task):
        task_id = task.task_id
        before = self._attempts[task_id]

        def is_given_up():
            records = self._deployment.records(task_id)
            return (
                journal_file.state_of(records) in journal_file.FINAL_STATES
                or journal_file.latest_attempt_id(records) != before
            )

        wait_until(is_given_up, _TAKEOVER_SECONDS, f"the end of the attempt of {task_id}")
        received = self._deployment.agent_sessions(task_id)
        self.given_up[task_id] = [session for session in received if session in self._sessions[task_id]]

    def _interrupt_hosts(self):
        """Pause one host and interrupt the link of another one, for less than the lease."""
        by_target = dict(zip(BRIEF_HOST_TARGETS, self._rng.sample(HOSTS, 2), strict=True))
        tasks = self._reach_on_hosts(by_target)
        with contextlib.ExitStack() as stack:
            self._cluster.cut_off(by_target["interrupted link"])
            stack.callback(self._cluster.reconnect, by_target["interrupted link"])
            for task in tasks["interrupted link"]:
                task.release()
            stopped = processes.stop_all(self._cluster.host_pids()[by_target["paused host"]])
            for pid in stopped:
                stack.callback(processes.resume, pid)
            time.sleep(PAUSE_SECONDS)

    def _fault_all(self, target):
        """Apply a fault that affects all tasks."""
        tasks = []
        # The runner of a task in provisioning or ready is stopped, but the time limits of these states continue.
        for states in (("staging", "completing"), ("provisioning", "ready", "running")):
            with ThreadPoolExecutor(5) as pool:
                tasks += [task for task, _ in pool.map(lambda state: self._reach(target, state), states)]
        self._cluster.restrict_to()
        tasks.append(self._reach(target, "pending")[0])
        time.sleep(self._rng.uniform(0, 0.5))
        self._note(target, *tasks)
        release_first = self._rng.random() < 0.5
        ports = [self._deployment.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")]
        match target:
            case "server":
                self._deployment.server.stop(signal.SIGKILL)
                if release_first:
                    self._release()
                self._deployment.start_server(ports=ports)
            case "paused server":
                self._deployment.server.send_signal(signal.SIGSTOP)
                if release_first:
                    self._release()
                time.sleep(PAUSE_SECONDS)
                self._deployment.server.send_signal(signal.SIGCONT)
            case "controller":
                self._cluster.kill_controller()
                if release_first:
                    self._release()
                self._cluster.start_controller()
            case "paused controller":
                self._cluster.pause_controller()
                if release_first:
                    self._release()
                time.sleep(PAUSE_SECONDS)
                self._cluster.resume_controller()
