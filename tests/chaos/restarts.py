"""Restarts the server repeatedly while tasks run and clients follow them."""

import asyncio
import itertools
import random
import signal
from dataclasses import dataclass

from chaos.chaos_deployment import ChaosDeployment
from chaos.oracle import check_received_events
from chaos.reconnecting_clients import CliClient, SseClient, WebSocketClient
from doubles.deployment import wait_until
from sandbox.journal.journals import FileJournals
from sandbox.model.wire.event_conversion import end_event, to_wire_event

MANY_CLIENTS = (*[SseClient] * 8, *[WebSocketClient] * 6, *[CliClient] * 6)
FEW_CLIENTS = (*[SseClient] * 2, *[WebSocketClient] * 2, *[CliClient] * 2)
ENDLESS_LINE_COUNT = 100_000
END_TIMEOUT_SECONDS = 120


@dataclass
class RestartResult:
    """The outcome of repeated restarts.

    kill_count: the number of restarts after SIGKILL instead of SIGTERM.
    connections: how often each client connected, except for command-line clients.
    """

    restarts: int
    kill_count: int
    client_count: int
    event_count: int
    connections: list
    violations: list


def run_restarts(directory, restarts, seed, *, tasks=5, client_types=MANY_CLIENTS):
    """Restart the server while one client of each type in client_types follows one of the tasks."""
    with ChaosDeployment(directory) as deployment:
        for number in range(tasks):
            deployment.submit_instructions(f"task-{number}", lines=ENDLESS_LINE_COUNT, pause_seconds=0.05)
        for task_id in deployment.submitted:
            wait_until(lambda task_id=task_id: deployment.state(task_id) == "running", 60, "all to run")
        return asyncio.run(_run(deployment, restarts, random.Random(seed), client_types))


async def _run(deployment, restarts, rng, client_types):
    clients = [
        client_type(deployment, task_id)
        for client_type, task_id in zip(client_types, itertools.cycle(deployment.submitted), strict=False)
    ]
    receiving = asyncio.gather(*(client.follow() for client in clients))
    signals = [number for _ in range(0, restarts, 2) for number in rng.sample([signal.SIGKILL, signal.SIGTERM], 2)][
        :restarts
    ]
    try:
        for number, signal_number in enumerate(signals):
            # A command must reconnect within 30 s. So only every second server is stopped while clients are still
            # reconnecting. The others are stopped after all clients have reconnected.
            if number % 2 == 0:
                await _wait_for_new_events(clients, receiving)
            await asyncio.sleep(rng.uniform(0, 1.5))
            await asyncio.to_thread(deployment.restart_server, signal_number)
        for task_id in deployment.submitted:
            await asyncio.to_thread(deployment.http.delete, f"/api/v1/tasks/{task_id}?force=true")
        await asyncio.wait_for(receiving, END_TIMEOUT_SECONDS)
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
    violations = [message for number, client in enumerate(clients) for message in _compare(deployment, number, client)]
    events = sum(len(client.events) for client in clients)
    killed = signals.count(signal.SIGKILL)
    connections = [client.connections for client in clients if not isinstance(client, CliClient)]
    return RestartResult(restarts, killed, len(clients), events, connections, violations)


async def _wait_for_new_events(clients, receiving):
    """Wait until every client has received a new event."""
    before = [len(client.events) for client in clients]
    async with asyncio.timeout(END_TIMEOUT_SECONDS):
        while any(len(client.events) == count for client, count in zip(clients, before, strict=True)):
            if receiving.done():
                await receiving
            await asyncio.sleep(0.05)


def _compare(deployment, number, client):
    expected_events = {client.task_id: _expected_events(deployment, client.task_id, client.is_delivered)}
    return check_received_events(
        expected_events, {(f"{type(client).__name__} {number}", client.task_id): client.events}
    )


def _expected_events(deployment, task_id, is_delivered):
    """Return the journal's events that a client of this kind receives."""
    journals, offset, events = FileJournals(deployment.data_dir), 0, []
    while (batch := journals.read(task_id, offset)).records:
        events += [
            event for record in batch.records if (event := to_wire_event(task_id, record)) and is_delivered(event)
        ]
        offset = batch.next_offset
    return [*events, end_event(journals.replay(task_id).task)]
