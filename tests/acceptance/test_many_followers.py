"""Ten clients follow a busy task, disconnect at arbitrary bytes, reconnect, and receive every event once."""

import asyncio
import json
import re
import time

import pytest

from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.random_seed import seed
from doubles.reconnecting_sse_clients import ReconnectingClient, make_clients
from sandbox.demo.scripted_model import Text, Turn

CLIENTS = 10
LINES = 3000
FOLLOW_SECONDS = 15.0
LINES_PER_TURN = 1000


def busy_turn(number):
    """Return a turn with text blocks. Claude Code prints a line per block, up to a thousand lines per second."""
    first = number * LINES_PER_TURN
    lines = (Text(f"This is line {n} of what the agent says.") for n in range(first, first + LINES_PER_TURN))
    return Turn((*lines, *bash_turn("true").content), block_delay_seconds=0.0005)


def line_numbers(deployment):
    """Return the line numbers in the agent's messages."""
    messages = (json.loads(event["data"]) for event in deployment.wire_events() if event.get("stream") == "stdout")
    texts = (json.dumps(message["message"]["content"]) for message in messages if message["type"] == "assistant")
    return [int(number) for text in texts for number in re.findall(r"This is line (\d+) ", text)]


async def follow_until_enough(deployment, port, seed):
    """Return the reconnecting clients, and a reference client that has read the finished stream over one connection."""
    clients = make_clients(CLIENTS, port, "task-1", seed=seed)
    running = asyncio.gather(*(client.follow() for client in clients))
    try:
        await asyncio.to_thread(
            wait_until, lambda: "This is line" in deployment.logs(stream="stdout"), 60, "the first line"
        )
        deadline = time.monotonic() + FOLLOW_SECONDS
        while time.monotonic() < deadline and max(len(client.seqs) for client in clients) < LINES:
            await asyncio.wait({running}, timeout=0.1)
            if running.done():
                await running
        await asyncio.to_thread(deployment.http.delete, "/api/v1/tasks/task-1?force=true")
        await asyncio.wait_for(running, 60)
    finally:
        running.cancel()
    reference = ReconnectingClient(port, "task-1")
    await asyncio.wait_for(reference.follow(), 60)
    return clients, reference


@pytest.mark.timeout(180)
def test_clients_receive_every_event_exactly_once_in_order(deploy):
    deployment = deploy(*[busy_turn(number) for number in range(2 * LINES // LINES_PER_TURN)], reply_turn())
    deployment.submit()
    port = deployment.http.base_url.port
    clients, reference = asyncio.run(follow_until_enough(deployment, port, seed()))

    assert deployment.status()["state"] == "cancelled", deployment.diagnostics()
    assert reference.reconnects == 0
    assert reference.seqs == sorted(set(reference.seqs))
    assert reference.seqs[0] == 1
    for client in clients:
        assert client.reconnects >= 1
        assert client.seqs == reference.seqs
        assert client.digest == reference.digest
    numbers = line_numbers(deployment)
    assert numbers
    assert numbers == list(range(len(numbers)))
    print(f"{len(reference.seqs)} events; connections lost: {[client.reconnects for client in clients]}")
