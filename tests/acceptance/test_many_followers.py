"""Ten follow one busy task, lose their connections at any byte, come back, and each has heard everything once."""

import asyncio
import json
import re
import time

import pytest

from doubles.live_server import bash, says, until
from doubles.reconnecting_clients import Follower, restless
from doubles.sample_tasks import seed
from sandbox.demo.model_script import Text, Turn

FOLLOWERS = 10
LINES = 3000
SECONDS = 15.0
LINES_A_TURN = 1000


def busy_turn(number):
    """Claude Code prints a line for each piece of text, a thousand a second where the machine is fast enough."""
    first = number * LINES_A_TURN
    lines = (Text(f"This is line {n} of what the agent says.") for n in range(first, first + LINES_A_TURN))
    return Turn((*lines, *bash("true").content), block_delay_seconds=0.0005)


def line_numbers(machine):
    """Of what the agent said, as far as the task came."""
    said = (json.loads(frame["data"]) for frame in machine.frames() if frame.get("stream") == "stdout")
    texts = (json.dumps(message["message"]["content"]) for message in said if message["type"] == "assistant")
    return [int(number) for text in texts for number in re.findall(r"This is line (\d+) ", text)]


async def follow_until_enough(machine, port, seed):
    """Gives the restless followers and, for comparison, one that read the finished story in one go."""
    followers = restless(FOLLOWERS, port, "task-1", seed=seed)
    following = asyncio.gather(*(follower.follow() for follower in followers))
    try:
        await asyncio.to_thread(until, lambda: "This is line" in machine.logs(stream="stdout"), 60, "the first line")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and max(len(follower.seqs) for follower in followers) < LINES:
            await asyncio.wait({following}, timeout=0.1)
            if following.done():
                await following
        await asyncio.to_thread(machine.http.delete, "/api/v1/tasks/task-1?force=true")
        await asyncio.wait_for(following, 60)
    finally:
        following.cancel()
    steady = Follower(port, "task-1")
    await asyncio.wait_for(steady.follow(), 60)
    return followers, steady


@pytest.mark.timeout(180)
def test_each_has_every_event_exactly_once_and_in_order(world):
    machine = world(*[busy_turn(number) for number in range(2 * LINES // LINES_A_TURN)], says())
    machine.submit()
    port = machine.http.base_url.port
    followers, steady = asyncio.run(follow_until_enough(machine, port, seed()))

    assert machine.status()["state"] == "cancelled", machine.tell()
    assert steady.resumed == 0
    assert steady.seqs == sorted(set(steady.seqs))
    assert steady.seqs[0] == 1
    for follower in followers:
        assert follower.resumed >= 1
        assert follower.seqs == steady.seqs
        assert follower.digest == steady.digest
    numbers = line_numbers(machine)
    assert numbers
    assert numbers == list(range(len(numbers)))
    print(f"{len(steady.seqs)} events; connections lost: {[follower.resumed for follower in followers]}")
