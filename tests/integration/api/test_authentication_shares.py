"""A token with many streams delays only its own requests."""

import asyncio
import threading

import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication, client_limits
from sandbox.api.routes import live_events, submission
from sandbox.api.routes import tasks as routes_of_tasks
from sandbox.interfaces.server_services import TaskNotFoundError
from sandbox.model import events as e
from sandbox.model.fixed_limits import FOLLOW_BATCH_BYTES
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import CONCURRENT_THREADS_MAX, MESSAGES_PER_TURN_MAX

STREAMS, LINES = 20, 300


def connect_as_viewer(api, query=""):
    return connect(api.ws(query), additional_headers={"Authorization": "Bearer vera"}, max_queue=None)


async def receive(stream, received):
    async for message in stream:
        received.append(message)


def count_outputs(received):
    return [sum('"type":"output"' in message for message in events) for events in received]


class MessagesPerLoopIteration:
    """The maximum number of messages that are encoded in one iteration of the event loop."""

    def __init__(self, monkeypatch):
        self.maximum = self._count_in_iteration = 0
        original = live_events.WebSocketEncoder.encode

        def messages(encoder, events):
            encoded = original(encoder, events)
            self._count_in_iteration += len(encoded)
            self.maximum = max(self.maximum, self._count_in_iteration)
            return encoded

        monkeypatch.setattr(live_events.WebSocketEncoder, "encode", messages)

    async def watch(self):
        while True:
            self._count_in_iteration = 0
            await asyncio.sleep(0)


async def test_streams_of_one_token_are_sent_in_small_batches(running_api, wait_until, monkeypatch):
    counter = MessagesPerLoopIteration(monkeypatch)

    async def scenario():
        async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api:
            api.tasks.add("task-001", *TO_RUNNING)
            streams = [await connect_as_viewer(api) for _ in range(STREAMS)]
            received = [[] for _ in streams]
            receivers = [asyncio.create_task(receive(*each)) for each in zip(streams, received, strict=True)]
            watching = asyncio.create_task(counter.watch())
            api.tasks.record("task-001", *(e.Output.from_bytes("stdout", b"a line\n") for _ in range(LINES)))
            async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer otto"}) as other_client:
                assert (await other_client.get("/api/v1/tasks/task-001")).status_code == 200
            await wait_until(lambda: count_outputs(received) == [LINES] * STREAMS, 30)
            watching.cancel()
            for stream in streams:
                await stream.close()
            await asyncio.gather(*receivers)

    await scenario()
    assert counter.maximum <= 2 * MESSAGES_PER_TURN_MAX


async def test_streams_of_all_tasks_are_limited_per_token(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(client_limits, "ALL_TASKS_STREAMS_MAX", 2)
    async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api:
        api.tasks.add("task-001", *TO_RUNNING)
        first, second = await connect_as_viewer(api), await connect_as_viewer(api)
        with pytest.raises(InvalidStatus) as raised:
            await connect_as_viewer(api)
        assert raised.value.response.status_code == 429
        assert raised.value.response.headers["Retry-After"]
        async with connect_as_viewer(api, "?task_id=task-001") as stream:
            assert await stream.recv()
        async with connect(api.ws(), additional_headers={"Authorization": "Bearer otto"}):
            await first.close()
            await wait_until(lambda: api.count_open_streams("websocket") == 2)
        async with connect_as_viewer(api):
            await second.close()


async def test_number_of_concurrent_artifact_lists_per_token_is_limited(running_api, monkeypatch):
    async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api:
        api.tasks.add("task-001", *TO_RUNNING)
        active, maximum, may_continue = 0, 0, asyncio.Event()
        list_artifacts = api.tasks.list_artifacts

        async def artifacts(task_id):
            nonlocal active, maximum
            active, maximum = active + 1, max(maximum, active + 1)
            await may_continue.wait()
            active -= 1
            return await list_artifacts(task_id)

        monkeypatch.setattr(api.tasks, "list_artifacts", artifacts)
        async with httpx2.AsyncClient(base_url=api.http, timeout=20) as client:
            path, first, second = (
                "/api/v1/tasks/task-001/artifacts",
                *({"Authorization": f"Bearer {name}"} for name in ("vera", "otto")),
            )
            requests = [asyncio.create_task(client.get(path, headers=first)) for _ in range(20)]
            async with asyncio.timeout(10):
                while active < CONCURRENT_THREADS_MAX:
                    await asyncio.sleep(0.01)
            assert (await client.get("/api/v1/tasks?limit=1000", headers=second)).status_code == 200
            assert maximum == CONCURRENT_THREADS_MAX
            may_continue.set()
            assert {response.status_code for response in await asyncio.gather(*requests)} == {200}


@pytest.mark.parametrize("path", ["", "/wait?timeout=0", "/manifest"])
async def test_number_of_tasks_that_requests_of_one_token_keep_in_memory_is_limited(running_api, monkeypatch, path):
    """A task with many artifacts uses megabytes."""
    async with running_api(FakeTokenStore(vera="operator", otto="operator")) as api:
        api.tasks.add("task-001", *TO_RUNNING)
        loaded = maximum = 0
        status = api.tasks.status

        async def load(task_id):
            nonlocal loaded, maximum
            task = await fair_client_shares.to_thread(asyncio.run, status(task_id))
            loaded, maximum = loaded + 1, max(maximum, loaded + 1)
            return task

        def unload(*_):
            nonlocal loaded
            loaded -= 1
            return {}

        async def chain(task):
            return await fair_client_shares.to_thread(lambda: [task])

        async def body(tasks, *_, **__):
            await chain(None)
            return unload()

        monkeypatch.setattr(api.tasks, "status", load)
        monkeypatch.setattr(routes_of_tasks, "task_body", body)
        monkeypatch.setattr(routes_of_tasks, "manifest_data", unload)
        async with httpx2.AsyncClient(
            base_url=api.http, timeout=20, headers={"Authorization": "Bearer vera"}
        ) as client:
            responses = await asyncio.gather(*(client.get(f"/api/v1/tasks/task-001{path}") for _ in range(30)))
        assert {response.status_code for response in responses} == {200}
        assert maximum <= CONCURRENT_THREADS_MAX


async def test_many_concurrent_continuations_of_one_token_are_all_answered(running_api, monkeypatch):
    """Each reserves memory for its body, and then for the conversation of the earlier task, which uses megabytes."""
    async with running_api(FakeTokenStore(otto="operator")) as api:
        api.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
        started = active = maximum = 0

        async def plan(task_id):
            nonlocal started, active, maximum
            started, active, maximum = started + 1, active + 1, max(maximum, active + 1)
            await asyncio.sleep(0.02)  # so that other requests reserve memory
            active -= 1
            async with fair_client_shares.current_memory_share().reservation(5 * FOLLOW_BATCH_BYTES):
                raise TaskNotFoundError(task_id)

        monkeypatch.setattr(api.tasks, "plan_continuation", plan)
        async with httpx2.AsyncClient(
            base_url=api.http, timeout=20, headers={"Authorization": "Bearer otto"}
        ) as client:
            path, body = "/api/v1/tasks/task-001/continue", {"prompt": "Go on."}
            responses = await asyncio.gather(*(client.post(path, json=body) for _ in range(100)))
        assert {response.status_code for response in responses} == {404}
        assert started == 100
        assert maximum <= CONCURRENT_THREADS_MAX


async def test_pipelined_unauthenticated_requests_are_answered_in_small_batches(running_api, wait_until, monkeypatch):
    responses = maximum = count_in_turn = 0
    denied = authentication._denied_response

    def count(*arguments):
        nonlocal responses, maximum, count_in_turn
        responses, count_in_turn = responses + 1, count_in_turn + 1
        maximum = max(maximum, count_in_turn)
        return denied(*arguments)

    async def watch():
        nonlocal count_in_turn
        while True:
            count_in_turn = 0
            await asyncio.sleep(0)

    monkeypatch.setattr(authentication, "_denied_response", count)

    async def scenario():
        async with running_api(FakeTokenStore(otto="operator")) as api:
            watcher = asyncio.create_task(watch())
            data = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20
            clients = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(100)]
            for _, writer in clients:
                writer.write(data)
            async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer otto"}) as other_client:
                assert (await other_client.get("/api/v1/tasks")).status_code == 200
            await wait_until(lambda: responses == 2000, 60)
            watcher.cancel()
            for _, writer in clients:
                writer.close()

    await scenario()
    assert maximum <= MESSAGES_PER_TURN_MAX


async def test_manifests_for_one_token_are_parsed_in_a_limited_number_of_threads(running_api, monkeypatch):
    active, maximum, may_continue, lock = 0, 0, threading.Event(), threading.Lock()
    parse = submission._parse_submission

    def count(body, *others):
        nonlocal active, maximum
        if body != b"slow":
            return parse(body, *others)
        with lock:
            active += 1
            maximum = max(maximum, active)
        may_continue.wait(20)
        with lock:
            active -= 1
        return parse(body, *others)

    monkeypatch.setattr(submission, "_parse_submission", count)
    async with (
        running_api(FakeTokenStore(olga="operator", otto="operator")) as api,
        httpx2.AsyncClient(base_url=api.http, timeout=20) as client,
    ):
        path, first, second = (
            "/api/v1/tasks?dry_run=true",
            *({"Authorization": f"Bearer {name}"} for name in ("olga", "otto")),
        )
        requests = [asyncio.create_task(client.post(path, content=b"slow", headers=first)) for _ in range(40)]
        async with asyncio.timeout(10):
            while active < CONCURRENT_THREADS_MAX:
                await asyncio.sleep(0.01)
            assert (await client.post(path, content=b"quick", headers=second)).status_code == 400
        may_continue.set()
        assert {response.status_code for response in await asyncio.gather(*requests)} == {400}
        assert maximum == CONCURRENT_THREADS_MAX
