"""The server is ended and started again, over and over, under running tasks and those who follow them."""

import asyncio
import itertools
import random
import signal
from dataclasses import dataclass

from chaos.machine import Machine
from chaos.oracle import every_follower_has_the_journal
from chaos.reconnecting_clients import CommandFollower, SseFollower, WebSocketFollower
from doubles.live_server import until
from sandbox.interfaces.journal import replay_task
from sandbox.journal.journals import FileJournals
from sandbox.model.wire.events import end_event, to_wire_event

MANY = (*[SseFollower] * 8, *[WebSocketFollower] * 6, *[CommandFollower] * 6)
FEW = (*[SseFollower] * 2, *[WebSocketFollower] * 2, *[CommandFollower] * 2)
LINES_OF_LONG = 100_000
END_SECONDS = 120


@dataclass
class Restarted:
    """killed: of the restarts those by KILL; the others were by TERM. connections: of each who counts them."""

    restarts: int
    killed: int
    followers: int
    frames: int
    connections: list
    broken: list


def play_restarts(directory, restarts, seed, *, tasks=5, kinds=MANY):
    """kinds: of followers, dealt out over the tasks."""
    with Machine(directory) as machine:
        for number in range(tasks):
            machine.order(f"task-{number}", lines=LINES_OF_LONG, pause_seconds=0.05)
        for task_id in machine.orders:
            until(lambda task_id=task_id: machine.state(task_id) == "running", 60, "all to run")
        return asyncio.run(_play(machine, restarts, random.Random(seed), kinds))


async def _play(machine, restarts, chance, kinds):
    followers = [kind(machine, task_id) for kind, task_id in zip(kinds, itertools.cycle(machine.orders), strict=False)]
    following = asyncio.gather(*(follower.follow() for follower in followers))
    ends = [one for _ in range(0, restarts, 2) for one in chance.sample([signal.SIGKILL, signal.SIGTERM], 2)][:restarts]
    try:
        for number, signal_number in enumerate(ends):
            # A command's first contact must succeed, and its patience is 30 s: half of the servers live until all are
            # back, the others die while some are on their way.
            if number % 2 == 0:
                await _hear_all(followers, following)
            await asyncio.sleep(chance.uniform(0, 1.5))
            await asyncio.to_thread(machine.restart_server, signal_number)
        for task_id in machine.orders:
            await asyncio.to_thread(machine.http.delete, f"/api/v1/tasks/{task_id}?force=true")
        await asyncio.wait_for(following, END_SECONDS)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    broken = [said for number, one in enumerate(followers) for said in _compare(machine, number, one)]
    frames = sum(len(one.frames) for one in followers)
    killed = ends.count(signal.SIGKILL)
    connections = [one.connections for one in followers if not isinstance(one, CommandFollower)]
    return Restarted(restarts, killed, len(followers), frames, connections, broken)


async def _hear_all(followers, following):
    """Until each has heard something new."""
    before = [len(one.frames) for one in followers]
    async with asyncio.timeout(END_SECONDS):
        while any(len(one.frames) == count for one, count in zip(followers, before, strict=True)):
            if following.done():
                await following
            await asyncio.sleep(0.05)


def _compare(machine, number, one):
    told = {one.task_id: _frames(machine, one.task_id, one.is_told)}
    return every_follower_has_the_journal(told, {(f"{type(one).__name__} {number}", one.task_id): one.frames})


def _frames(machine, task_id, is_told):
    """What the journal has for such a client."""
    journals, offset, frames = FileJournals(machine.data_dir), 0, []
    while (batch := journals.read(task_id, offset)).records:
        frames += [shown for record in batch.records if (shown := to_wire_event(task_id, record)) and is_told(shown)]
        offset = batch.next_offset
    return [*frames, end_event(replay_task(journals, task_id).task)]
