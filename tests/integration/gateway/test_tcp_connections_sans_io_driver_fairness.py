"""Even at maximum load, a gateway's clients do not starve the other coroutines of its runner."""

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway import tcp_connections
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.sans_io import Phase
from sandbox.gateway.tcp_connections import PriorityCpuQueues
from sandbox.interfaces.gateway import GatewayRules
from sandbox.primitives.runner_cpu_throttle import CpuThrottle

CLIENTS = 8
CHUNKS = b"1\r\nx\r\n" * 10_000


@asynccontextmanager
async def count_loop_iterations():
    """Simulate the runner's other work; yield a list that holds the number of the current event-loop iteration."""
    iteration = [0]

    async def count_iterations():
        while True:
            iteration[0] += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count_iterations())
    try:
        yield iteration
    finally:
        counter.cancel()


def test_many_clients_with_tiny_chunks_do_not_starve_the_loop(monkeypatch):
    calls_per_iteration: Counter[int] = Counter()
    iteration, processed, longest = [0], 0, 0
    process = ModelProtocol.client_data_received

    def record_and_process(self, data):
        nonlocal processed, longest
        calls_per_iteration[iteration[0]] += 1
        processed, longest = processed + len(data), max(longest, len(data))
        return process(self, data)

    monkeypatch.setattr(ModelProtocol, "client_data_received", record_and_process)

    async def scenario():
        nonlocal iteration
        async with served_gateway("http://127.0.0.1:9") as served, count_loop_iterations() as iteration:
            clients = [await served.connect() for _ in range(CLIENTS)]
            head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
            for client in clients:
                client.writer.write(head.encode() + CHUNKS)
            await wait_until(lambda: processed == CLIENTS * len(head.encode() + CHUNKS), seconds=20)

    run(scenario)
    assert max(calls_per_iteration.values()) == 1
    assert longest <= tcp_connections.READ_BYTES < len(CHUNKS)


def test_released_requests_are_processed_one_per_loop_iteration(monkeypatch):
    calls_per_iteration: Counter[int] = Counter()
    iteration = [0]
    resume = ModelProtocol.resume

    def record_and_resume(self):
        calls_per_iteration[iteration[0]] += 1
        return resume(self)

    monkeypatch.setattr(ModelProtocol, "resume", record_and_resume)

    async def scenario():
        nonlocal iteration
        async with (
            served_gateway("http://127.0.0.1:9", GatewayRules(hold_model_requests=True)) as served,
            count_loop_iterations() as iteration,
        ):
            for _ in range(CLIENTS):
                (await served.connect()).send_request()
            protocols = served.gateway._model_protocols
            await wait_until(lambda: sum(protocol.phase is Phase.HELD for protocol in protocols) == CLIENTS)
            served.gateway.release_model_requests()
            await wait_until(lambda: sum(calls_per_iteration.values()) == CLIENTS)

    run(scenario)
    assert max(calls_per_iteration.values()) == 1


def test_long_work_is_followed_by_a_pause_of_the_same_duration():
    """A body that takes a second to check must not be followed by the next one before the sandbox is measured."""
    spans = []

    def work(seconds):
        started_at = time.monotonic()
        time.sleep(seconds)
        spans.append((started_at, time.monotonic()))

    async def scenario():
        throttle = CpuThrottle()
        queues = PriorityCpuQueues(throttle)
        await asyncio.gather(*(queues.run(queues.model, partial(work, 0.2)) for _ in range(3)))

    run(scenario)
    assert all(later[0] - earlier[1] >= 0.19 for earlier, later in pairwise(spans))


def test_short_work_is_not_followed_by_a_pause():
    async def scenario():
        queues = PriorityCpuQueues(CpuThrottle(cpu_seconds=lambda: 0.0))
        started_at = time.monotonic()
        await asyncio.gather(*(queues.run(queues.model, int) for _ in range(1000)))
        return time.monotonic() - started_at

    assert asyncio.run(scenario()) < 1.0
