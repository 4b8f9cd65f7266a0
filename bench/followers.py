"""What followers of one hot task cost the server, and how late they hear: `python bench/followers.py [N] [SECONDS]`.

The task prints 1,000 lines a second into a real journal; N followers (20 without) read them by SSE. Printed: the
server's CPU time with none and with N of them, whether each had every event exactly once, and p50 and p99 of the time
from a record to its reader.
"""

import asyncio
import json
import multiprocessing
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LINES_PER_SECOND = 1000
TICKS_PER_SECOND = 40
SAMPLED_EVERY = 20
EVENT = re.compile(rb"^id: (\d+)\nevent: \w+\ndata: (.*)\n\n", re.MULTILINE)
TEXT = "a line of output as agents print it, with some words and a number: %d\n"


def main(followers: int = 20, seconds: int = 10) -> None:
    """Measure without followers, then with them."""
    alone, _ = measure(0, seconds)
    cost, readers = measure(followers, seconds)
    delays = sorted(delay for _, found in readers for delay in found)
    longest = max((seqs for seqs, _ in readers), key=len)
    whole = sum(seqs == longest and seqs == sorted(set(seqs)) for seqs, _ in readers)
    print(f"{followers} followers, {LINES_PER_SECOND} lines/s for {seconds} s, {len(longest)} events each")
    print(f"server CPU: {alone / seconds:.1%} of a core alone, {cost / seconds:.1%} with them")
    print(f"a follower: {(cost - alone) / followers / seconds:.2%} of a core")
    print(f"whole, in order, exactly once: {whole} of {followers}")
    print(f"delay: p50 {delays[len(delays) // 2]:.0f} ms, p99 {delays[len(delays) * 99 // 100]:.0f} ms")


def measure(followers: int, seconds: int) -> tuple[float, list[tuple[list[int], list[float]]]]:
    """CPU seconds of the server, and of each follower the seqs and delays in milliseconds."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_one_task, args=(there, seconds))
    server.start()
    readers = asyncio.run(read_all(here, followers))
    cpu_seconds: float = here.recv()
    server.join(10)
    return cpu_seconds, readers


async def read_all(server: Connection, followers: int) -> list[tuple[list[int], list[float]]]:
    """Follow until the end."""
    port = await asyncio.to_thread(server.recv)
    began = [asyncio.Event() for _ in range(followers)]
    tasks = [asyncio.create_task(read(port, event)) for event in began]
    for event in began:
        await event.wait()
    server.send("go")
    return await asyncio.gather(*tasks)


async def read(port: int, began: asyncio.Event) -> tuple[list[int], list[float]]:
    """One follower, as lean as Python allows."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(b"GET /api/v1/tasks/task-001/logs?follow=true HTTP/1.0\r\nHost: localhost\r\n\r\n")
    seqs: list[int] = []
    delays: list[float] = []
    rest = b""
    while chunk := await reader.read(2**18):
        now = datetime.now(UTC)
        text = rest + chunk
        end = 0
        for match in EVENT.finditer(text):
            seqs.append(int(match[1]))
            end = match.end()
            if len(seqs) % SAMPLED_EVERY == 0:
                at = datetime.fromisoformat(json.loads(match[2])["timestamp"])
                delays.append((now - at).total_seconds() * 1000)
        rest = text[end:]
        if seqs:
            began.set()
    writer.close()
    return seqs, delays


def serve_one_task(parent: Connection, seconds: int) -> None:
    """The server's process; the task's runner is a part of it, so its cost is in both figures."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(serve_and_play(Path(directory), parent, seconds))


async def serve_and_play(data_dir: Path, parent: Connection, seconds: int) -> None:
    """Until the task has ended and its followers are gone."""
    from doubles.fake_access import FakeAccess
    from doubles.fake_tasks import manifest
    from doubles.server_rooms import TO_END, TO_RUNNING, Rooms
    from sandbox.api.addresses import bind
    from sandbox.api.app import create_app, create_stream_app
    from sandbox.api.guard import Guard
    from sandbox.api.serve import serve
    from sandbox.api.settings import ApiSettings
    from sandbox.model.event import Output
    from sandbox.stores.sqlite import SqliteStore

    rooms = Rooms(data_dir, SqliteStore(data_dir / "index.sqlite"))
    sockets, stream_sockets = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    settings = ApiSettings("bench", frozenset({port}))
    shutting_down = asyncio.Event()
    async with rooms.server() as service:
        guard = Guard(FakeAccess(), settings)
        app = create_app(service, settings=settings, shutting_down=shutting_down, guard=guard)
        serving = asyncio.create_task(
            serve(app, create_stream_app(app), sockets, stream_sockets, shutting_down=shutting_down)
        )
        await service.submit(manifest("task-001"))
        await rooms.launched("task-001")
        rooms.runners.play("task-001", *TO_RUNNING)
        parent.send(port)
        await asyncio.to_thread(parent.recv)
        cpu_before, began = time.process_time(), time.monotonic()
        per_tick = LINES_PER_SECOND // TICKS_PER_SECOND
        for tick in range(seconds * TICKS_PER_SECOND):
            lines = [Output.of("stdout", (TEXT % (tick * per_tick + n)).encode()) for n in range(per_tick)]
            rooms.runners.play("task-001", *lines)
            await asyncio.sleep(max(0.0, began + (tick + 1) / TICKS_PER_SECOND - time.monotonic()))
        cpu_seconds = time.process_time() - cpu_before
        rooms.runners.play("task-001", *TO_END)
        await asyncio.sleep(1)
        shutting_down.set()
        await serving
    parent.send(cpu_seconds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
