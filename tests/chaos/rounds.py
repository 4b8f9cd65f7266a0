"""One round: tasks are brought to their moments, something is killed, and the oracle is asked.

A cell is a victim in a state, as a pair of names.
"""

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from chaos import journal_file, processes
from chaos.checks import examine
from chaos.kill_points import Moments
from chaos.machine import Machine
from chaos.oracle import BROKEN_OFF, LOST_SANDBOX, STATES, TRUE_ENDS, judge
from doubles.leftovers import processes as processes_told_of
from doubles.runners import runner_of

BURST_TASKS = 3
BURST_SECONDS = 0.25
SHARED = ("server", "all")
"""Victims that all tasks have in common; every other one is a single task's own."""


@dataclass
class Found:
    """What came of a round. ends: how often each (victim, state at the blow, end) was seen; broken: of the promises."""

    ends: Counter
    broken: list

    @property
    def met(self):
        """Which (victim, state) were played.

        A runner that saw its sandbox or its agent die first was done with running by then.
        """
        saw_it_first = {("all", LOST_SANDBOX), ("all", BROKEN_OFF)}
        return {(victim, "running" if (victim, end) in saw_it_first else state) for victim, state, end in self.ends}


def play(directory, runtime, chosen, seed):
    """chosen: the cells. One machine has them all: first what is a task's own, then each of what is shared."""
    with Machine(directory, runtime) as machine:
        blows = {}
        if own := [cell for cell in chosen if cell[0] not in SHARED]:
            with _holding() as held:
                blows |= _strike_each(machine, own, seed, held)
        for victim in SHARED:
            if states := sorted(state for one, state in chosen if one == victim):
                machine.wait_for_all()
                with _holding() as held:
                    blows |= _strike_together(machine, victim, states, seed, held)
        evidence = examine(machine, blows)
    ends = Counter((story.victim, story.state, story.end) for story in evidence.stories if story.victim)
    return Found(ends, judge(evidence))


def cells(*victims):
    """All of these victims, among which `each` are those that are a task's own."""
    own = ("runner", "sandbox", *(("gateway",) if processes.can_destroy_sockets() else ()))
    named = [one for victim in victims for one in (own if victim == "each" else (victim,))]
    return {(one, state) for one in named for state in TRUE_ENDS[one] if state != "pending" or one in SHARED}


def deal(chance, *victims):
    """One of the cells of these victims for each state."""
    by_state = {}
    for victim, state in sorted(cells(*victims)):
        by_state.setdefault(state, []).append(victim)
    return [(chance.choice(those), state) for state, those in by_state.items()]


def _reach_all(machine, wanted, held, seed, **choices):
    """Together, since it takes some seconds each. wanted: pairs of name and state."""

    def reach(pair):
        name, state = pair
        moments = Moments(machine, random.Random(f"{seed} {name} {state}"), **choices)
        held.append(one := moments.reach(state, name))
        return one

    # What prints is not held, and what waits for room must come last: it is in front of all that come later.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reach, [pair for pair in wanted if pair[1] not in ("running", "pending")]))
        list(pool.map(reach, [pair for pair in wanted if pair[1] == "running"]))
        list(pool.map(reach, [pair for pair in wanted if pair[1] == "pending"]))


def _strike_together(machine, victim, states, seed, held):
    chance = random.Random(f"{seed} {victim}")
    # Where nobody else has room, nothing waits for it.
    beside = ["running"] if states == ["pending"] else []
    wanted = [(victim, state) for state in (*states, *beside)]
    _reach_all(machine, wanted, held, seed, is_endless=victim == "all")
    with _burst(machine, victim):
        time.sleep(chance.uniform(0, BURST_SECONDS))
        _kill_server(machine) if victim == "server" else _kill_everything(machine, held, chance)
    seen = {one.task_id: one.seen for one in held}
    blows = {task_id: (victim, machine.state(task_id), seen.get(task_id, b"")) for task_id in machine.orders}
    # One that was over by then, or never came to be, was not hit.
    blows = {task_id: blow for task_id, blow in blows.items() if blow[1] in STATES}
    lets_go_first, dies_again = chance.random() < 0.5, chance.random() < 0.5
    if lets_go_first:
        _let_go(held)
    machine.start_server()
    _let_go(held)
    if dies_again:
        time.sleep(chance.uniform(0, 1.5))
        _kill_server(machine)
        machine.start_server()
    return blows


@contextlib.contextmanager
def _holding():
    """Gives a list of tasks at their moments; whatever happens, all are let go."""
    held = []
    try:
        yield held
    finally:
        _let_go(held)


def _let_go(held):
    for one in held:
        one.let_go()


@contextlib.contextmanager
def _burst(machine, victim):
    """Somebody submits while it happens: what gets a 202 in the last moment is promised too."""
    is_over = threading.Event()

    def submit():
        for number in range(BURST_TASKS):
            if is_over.wait(0.05):
                return
            with contextlib.suppress(httpx.TransportError):
                machine.order(f"burst-{victim}-{number}")

    # Behind one that waits for all the room there is, nobody younger begins.
    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _kill_server(machine):
    machine.server.stop(signal.SIGKILL)


def _kill_everything(machine, held, chance):
    """In any order, with nobody in between who could mend it; until nothing is there any more."""
    pids = {machine.server.pid, *(one.runner for one in held if one.runner)}
    pids |= {runner_of(machine.data_dir, task_id) for task_id in list(machine.orders)} - {None}
    pids |= {pid for pid, _ in processes_told_of(machine.data_dir)}
    order = sorted(pids)
    chance.shuffle(order)
    for pid in order:
        processes.kill(pid)
    machine.server.stop(signal.SIGKILL)
    for task_id in list(machine.orders):
        while (pid := runner_of(machine.data_dir, task_id)) is not None:
            processes.kill(pid)
            time.sleep(0.001)


def _strike_each(machine, chosen, seed, held):
    wanted = [(*cell, 0) for cell in sorted(chosen)]
    wanted += [(one, "running", 1) for one in ("runner", "sandbox") if (one, "running") in chosen]
    with ThreadPoolExecutor(6) as pool:
        return dict(pool.map(lambda each: _strike_one(machine, *each, seed, held), wanted))


def _strike_one(machine, victim, state, retries, seed, held):
    """Gives the task and its blow."""
    chance = random.Random(f"{seed} {victim} {state} {retries}")
    is_endless = victim != "gateway" and not retries
    moments = Moments(machine, chance, needs_sandbox=victim != "runner", is_endless=is_endless, retries=retries)
    one = moments.reach(state, f"{victim}-{retries}" if retries else victim)
    held.append(one)
    if state == "running":
        time.sleep(chance.uniform(0, 0.3))
    records = machine.records(one.task_id)
    one.seen = journal_file.stdout_of(records)
    is_struck = _STRIKES[victim](one, journal_file.attempt_of(records), chance)
    one.let_go()
    if not is_struck:
        raise AssertionError(f"there was nothing to kill: {victim} in {state}")
    return one.task_id, (victim, journal_file.state_of(records), one.seen)


def _strike_runner(one, *_):
    processes.kill(one.runner)
    return True


def _strike_sandbox(_, attempt_id, chance):
    """The first process outside, or the one with number 1 inside."""
    first = next(iter(processes.members_of(attempt_id)), None)
    pid = chance.choice([first, processes.init_of(attempt_id) or first])
    if pid is None:
        return False
    processes.kill(pid)
    return True


def _strike_gateway(_, attempt_id, chance):
    """It has no process of its own: what can be killed of it is its sockets."""
    members = processes.members_of(attempt_id)
    return bool(members) and processes.destroy_sockets(members[0])


_STRIKES = {"runner": _strike_runner, "sandbox": _strike_sandbox, "gateway": _strike_gateway}
