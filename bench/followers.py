"""Measures the cost and delay of followers of a busy task: `python bench/followers.py [N] [SECONDS] [SEED]`.

The task prints 1,000 lines per second (for SECONDS, default 30) into a real journal. N followers (default 200) read
them over SSE, lose their connections at random and reconnect. Prints the server's CPU time with and without followers,
whether each follower received every event exactly once and in order, p50 and p99 of the delay until a connected
follower receives a record, and the machine's load before and after.
"""

import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from doubles.reconnecting_sse_clients import ReconnectingClient, make_clients

LINES_PER_SECOND = 1000
TICKS_PER_SECOND = 40
SAMPLED_EVERY = 20
CONNECTION_BYTES_LOG10 = (4.0, 7.0)
"""Each connection is closed after 10 kB to 10 MB, so one connection is closed every five seconds."""
TEXT = "a line of output as agents print it, with some words and a number: %d\n"


def main(followers: int = 200, seconds: int = 30, seed: int | None = None) -> None:
    """Measure without followers, then with them."""
    seed = random.randrange(2**32) if seed is None else seed
    print(f"seed {seed}, load average before: {os.getloadavg()[0]:.2f}", flush=True)
    alone, _, _ = measure(0, seconds, seed)
    cost, readers, delays = measure(followers, seconds, seed)
    last = max(reader.seqs[-1] for reader in readers)
    complete_count = sum(reader.seqs == list(range(1, last + 1)) for reader in readers)
    same = len({reader.digest for reader in readers}) == 1
    print(f"{followers} followers, {LINES_PER_SECOND} lines/s for {seconds} s, {last} events each")
    print(f"connections lost and resumed: {sum(reader.reconnects for reader in readers)}")
    comparison = "identical" if same else "NOT identical"
    print(f"complete, in order, exactly once: {complete_count} of {followers}, {comparison} bytes")
    print(f"server CPU: {alone / seconds:.1%} of a core alone, {cost / seconds:.1%} with them")
    print(f"a follower: {(cost - alone) / followers / seconds:.2%} of a core")
    print(f"delay: p50 {delays[len(delays) // 2]:.0f} ms, p99 {delays[len(delays) * 99 // 100]:.0f} ms")
    print(f"load average after: {os.getloadavg()[0]:.2f}")
    if complete_count < followers or not same:
        sys.exit(1)


def measure(followers: int, seconds: int, seed: int) -> tuple[float, list[ReconnectingClient], list[float]]:
    """Return the server's CPU seconds, the followers, and the sorted delays (ms) of a sample of the events."""
    own_end, server_end = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_one_task, args=(server_end, seconds))
    server.start()
    readers, delays = asyncio.run(read_all(own_end, followers, seed))
    cpu_seconds: float = own_end.recv()
    server.join(10)
    return cpu_seconds, readers, sorted(delays)


async def read_all(server: Connection, followers: int, seed: int) -> tuple[list[ReconnectingClient], list[float]]:
    """Follow until the end; the measurement starts when all followers have started."""
    delays: list[float] = []

    def record_delays(seqs: list[int], text: bytes, connected_at: float) -> None:
        now = time.time()
        for seq in seqs:
            if seq % SAMPLED_EVERY == 0 and (at := recorded_at(seq, text)) >= connected_at:
                delays.append((now - at) * 1000)

    port = await asyncio.to_thread(server.recv)
    readers = make_clients(
        followers, port, "task-001", seed=seed, connection_bytes_log10=CONNECTION_BYTES_LOG10, on_events=record_delays
    )
    tasks = [asyncio.create_task(reader.follow()) for reader in readers]
    for reader in readers:
        await reader.started.wait()
    server.send("go")
    await asyncio.gather(*tasks)
    server.send("gone")
    return readers, delays


def recorded_at(seq: int, text: bytes) -> float:
    """Return the time at which the event was recorded, in seconds since 1970."""
    begin = text.index(b'"timestamp":"', text.index(b"id: %d\n" % seq)) + len(b'"timestamp":"')
    return datetime.fromisoformat(text[begin : text.index(b'"', begin)].decode()).timestamp()


def serve_one_task(parent: Connection, seconds: int) -> None:
    """Run the server's process, which includes the task's runner; both measurements include its cost."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(serve_and_record(Path(directory), parent, seconds))


async def serve_and_record(data_dir: Path, parent: Connection, seconds: int) -> None:
    """Serve until the task has ended and its followers have disconnected."""
    from doubles.fake_tasks import TO_COMPLETED, manifest
    from doubles.fake_token_store import FakeTokenStore
    from doubles.server_components import TO_RUNNING, ServerComponents
    from sandbox.agents import registered_agents
    from sandbox.api.app import create_app, create_websocket_app
    from sandbox.api.app_context import AppContext
    from sandbox.api.authentication import RequestAdmission
    from sandbox.api.http.server import bind, serve
    from sandbox.api.settings import ApiSettings
    from sandbox.model.events import Output
    from sandbox.store.sqlite import SqliteStore

    components = ServerComponents(data_dir, SqliteStore(data_dir / "index.sqlite"))
    sockets, websocket_sockets = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    settings = ApiSettings("bench", frozenset({port}), agents=registered_agents())
    shutting_down = asyncio.Event()
    async with components.server() as service:
        admission = RequestAdmission(FakeTokenStore(), settings)
        context = AppContext.create(service.services, settings, shutting_down, admission)
        serving = asyncio.create_task(
            serve(
                create_app(context),
                create_websocket_app(context),
                sockets,
                websocket_sockets,
                shutting_down=shutting_down,
            )
        )
        await service.submit(manifest("task-001"))
        await components.wait_for_launch("task-001")
        components.placement.record("task-001", *TO_RUNNING)
        parent.send(port)
        await asyncio.to_thread(parent.recv)
        cpu_before, began = time.process_time(), time.monotonic()
        per_tick = LINES_PER_SECOND // TICKS_PER_SECOND
        for tick in range(seconds * TICKS_PER_SECOND):
            lines = [Output.from_bytes("stdout", (TEXT % (tick * per_tick + n)).encode()) for n in range(per_tick)]
            components.placement.record("task-001", *lines)
            await asyncio.sleep(max(0.0, began + (tick + 1) / TICKS_PER_SECOND - time.monotonic()))
        cpu_seconds = time.process_time() - cpu_before
        components.placement.record("task-001", *TO_COMPLETED)
        await asyncio.to_thread(parent.recv)
        shutting_down.set()
        await serving
    parent.send(cpu_seconds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
