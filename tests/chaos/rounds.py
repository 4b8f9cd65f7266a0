"""One round: bring tasks into states, kill processes, and let the oracle check the outcome.

A pair consists of a kill target and a state.
"""

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2

from chaos import journal_file, processes
from chaos.chaos_deployment import ChaosDeployment
from chaos.evidence_collection import collect_evidence
from chaos.oracle import AGENT_FAILED, ALLOWED_OUTCOMES, LOST_SANDBOX, STATES, evaluate
from chaos.state_driver import StateDriver
from doubles.leftovers import processes as task_processes

BURST_TASKS = 3
BURST_SECONDS = 0.25
SHARED_TARGETS = ("server", "all")
"""Kill targets that affect all tasks. Every other target belongs to a single task."""


@dataclass
class RoundResult:
    """The result of one round. outcomes: the number of tasks, keyed by (kill target, state at the kill, outcome)."""

    outcomes: Counter
    violations: list

    @property
    def covered(self):
        """The tested pairs of target and state.

        If the outcome shows that the sandbox or the agent died before the runner, the kill counts for `running`. The
        state at the kill is then ignored.
        """
        ended_earlier = {("all", LOST_SANDBOX), ("all", AGENT_FAILED)}
        return {
            (target, "running" if (target, outcome) in ended_earlier else state)
            for target, state, outcome in self.outcomes
        }


def run_round(directory, runtime, chosen_pairs, seed):
    """Test the pairs with one deployment: first the targets that belong to a single task, then each shared target."""
    with ChaosDeployment(directory, runtime=runtime) as deployment:
        kills = {}
        if own := [pair for pair in chosen_pairs if pair[0] not in SHARED_TARGETS]:
            with _held_tasks() as held:
                kills |= _kill_each(deployment, own, seed, held)
        for target in SHARED_TARGETS:
            if states := sorted(state for pair_target, state in chosen_pairs if pair_target == target):
                deployment.wait_for_all()
                with _held_tasks() as held:
                    kills |= _kill_together(deployment, target, states, seed, held)
        evidence = collect_evidence(deployment, kills)
    outcomes = Counter((task.target, task.state_at_kill, task.outcome) for task in evidence.tasks if task.target)
    return RoundResult(outcomes, evaluate(evidence))


def target_state_pairs(*targets):
    """Return all pairs of these targets and their states; `each` means all targets of a single task."""
    own = ("runner", "sandbox", *(("gateway",) if processes.can_destroy_sockets() else ()))
    named = [one for target in targets for one in (own if target == "each" else (target,))]
    return {
        (target, state)
        for target in named
        for state in ALLOWED_OUTCOMES[target]
        if state != "pending" or target in SHARED_TARGETS
    }


def pick_pairs(rng, *targets):
    """Return one pair for each state, with one of these targets chosen at random."""
    by_state = {}
    for target, state in sorted(target_state_pairs(*targets)):
        by_state.setdefault(state, []).append(target)
    return [(rng.choice(candidates), state) for state, candidates in by_state.items()]


def _reach_all(deployment, requested, held, seed, **options):
    """Bring tasks into states concurrently, since each takes some seconds. requested: pairs of name and state."""

    def reach(pair):
        name, state = pair
        driver = StateDriver(deployment, random.Random(f"{seed} {name} {state}"), **options)
        held.append(task := driver.reach(state, name))
        return task

    # The runners of running tasks are not stopped. Start these tasks late, because they could end too early. Pending
    # tasks must come last, because they block all later tasks.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reach, [pair for pair in requested if pair[1] not in ("running", "pending")]))
        list(pool.map(reach, [pair for pair in requested if pair[1] == "running"]))
        list(pool.map(reach, [pair for pair in requested if pair[1] == "pending"]))


def _kill_together(deployment, target, states, seed, held):
    rng = random.Random(f"{seed} {target}")
    # A task is pending only while another one uses the capacity.
    extra = ["running"] if states == ["pending"] else []
    requested = [(target, state) for state in (*states, *extra)]
    _reach_all(deployment, requested, held, seed, is_endless=target == "all")
    with _burst(deployment, target):
        time.sleep(rng.uniform(0, BURST_SECONDS))
        _kill_server(deployment) if target == "server" else _kill_everything(deployment, held, rng)
    stdout_before = {task.task_id: task.stdout_before for task in held}
    kills = {
        task_id: (target, deployment.state(task_id), stdout_before.get(task_id, b""))
        for task_id in deployment.submitted
    }
    # Tasks that had ended before the kill, or never existed, were not affected.
    kills = {task_id: kill for task_id, kill in kills.items() if kill[1] in STATES}
    releases_first, kills_twice = rng.random() < 0.5, rng.random() < 0.5
    if releases_first:
        _release(held)
    deployment.start_server()
    _release(held)
    if kills_twice:
        time.sleep(rng.uniform(0, 1.5))
        _kill_server(deployment)
        deployment.start_server()
    return kills


@contextlib.contextmanager
def _held_tasks():
    """Yield a list for held tasks, and release all of them at the end."""
    held = []
    try:
        yield held
    finally:
        _release(held)


def _release(held):
    for task in held:
        task.release()


@contextlib.contextmanager
def _burst(deployment, target):
    """Submit tasks during the kill, because a task that gets a 202 just before the kill must exist too."""
    has_ended = threading.Event()

    def submit():
        for number in range(BURST_TASKS):
            if has_ended.wait(0.05):
                return
            with contextlib.suppress(httpx2.TransportError):
                deployment.submit_instructions(f"burst-{target}-{number}")

    # While a task waits for all CPUs, no task submitted later starts.
    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _kill_server(deployment):
    deployment.server.stop(signal.SIGKILL)


def _kill_everything(deployment, held, rng):
    """Kill all processes in random order, without giving any of them time to recover.

    A runner that is not held would report the death of its task's processes, so it is killed before them.
    """
    pids = {deployment.server.pid, *(task.runner for task in held if task.runner)}
    pids |= {pid for pid, _ in task_processes(deployment.data_dir)}
    # The burst of submissions may start tasks at any time. The runner of each process in `pids` was started before that
    # process.
    task_ids = [path.name for path in (deployment.data_dir / "tasks").iterdir()]
    runners = {deployment.find_runner(task_id) for task_id in task_ids} - pids - {None}
    for order in (sorted(runners), sorted(pids)):
        rng.shuffle(order)
        for pid in order:
            processes.kill(pid)
    deployment.server.stop(signal.SIGKILL)
    for task_id in list(deployment.submitted):
        while (pid := deployment.find_runner(task_id)) is not None:
            processes.kill(pid)
            time.sleep(0.001)


def _kill_each(deployment, chosen_pairs, seed, held):
    requested = [(*pair, 0) for pair in sorted(chosen_pairs)]
    requested += [(target, "running", 1) for target in ("runner", "sandbox") if (target, "running") in chosen_pairs]
    with ThreadPoolExecutor(6) as pool:
        return dict(pool.map(lambda each: _kill_one(deployment, *each, seed, held), requested))


def _kill_one(deployment, target, state, retries, seed, held):
    """Kill one target. Return the task id, and the kill as (target, state, stdout read before)."""
    rng = random.Random(f"{seed} {target} {state} {retries}")
    is_endless = target != "gateway" and not retries
    driver = StateDriver(deployment, rng, needs_sandbox=target != "runner", is_endless=is_endless, retries=retries)
    task = driver.reach(state, f"{target}-{retries}" if retries else target)
    held.append(task)
    if state == "running":
        time.sleep(rng.uniform(0, 0.3))
    records = deployment.latest_records(task.task_id)
    task.stdout_before = journal_file.stdout_of(records)
    is_killed = _KILL_FUNCTIONS[target](task, journal_file.latest_attempt_id(records), rng)
    task.release()
    if not is_killed:
        raise AssertionError(f"there was nothing to kill: {target} in {state}")
    return task.task_id, (target, journal_file.state_of(records), task.stdout_before)


def _kill_runner(task, *_):
    processes.kill(task.runner)
    return True


def _kill_sandbox(_, attempt_id, rng):
    """Kill the sandbox's first process on the host, or its pid 1."""
    first = next(iter(processes.members_of(attempt_id)), None)
    pid = rng.choice([first, processes.init_of(attempt_id) or first])
    if pid is None:
        return False
    processes.kill(pid)
    return True


def _kill_gateway(_, attempt_id, rng):
    """Destroy the gateway's sockets, because the gateway has no separate process."""
    members = processes.members_of(attempt_id)
    return bool(members) and processes.destroy_sockets(members[0])


_KILL_FUNCTIONS = {"runner": _kill_runner, "sandbox": _kill_sandbox, "gateway": _kill_gateway}
