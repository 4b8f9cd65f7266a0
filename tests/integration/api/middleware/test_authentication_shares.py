"""A token with many streams delays its own, and nobody else."""

import asyncio
import threading

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_RUNNING
from sandbox.api.auth import authenticator
from sandbox.api.middleware import authentication
from sandbox.api.routes import tasks
from sandbox.api.streaming import websocket
from sandbox.model import events as e
from sandbox.system.fair_share import MESSAGES_PER_TURN_MAX, THREADS_AT_ONCE_MAX

STREAMS, LINES = 20, 300


def as_vera(doors, query=""):
    return connect(doors.ws(query), additional_headers={"Authorization": "Bearer vera"}, max_queue=None)


async def hear(following, heard):
    async for message in following:
        heard.append(message)


def outputs(heard):
    return [sum('"type":"output"' in one for one in told) for told in heard]


class TurnCount:
    """The most messages that were made in one turn of the event loop."""

    def __init__(self, monkeypatch):
        self.most = self._now = 0
        original = websocket.WebSocketEncoder.encode

        def messages(view, frames):
            made = original(view, frames)
            self._now += len(made)
            self.most = max(self.most, self._now)
            return made

        monkeypatch.setattr(websocket.WebSocketEncoder, "encode", messages)

    async def watch(self):
        while True:
            self._now = 0
            await asyncio.sleep(0)


def test_all_streams_of_a_token_are_told_in_small_parts_and_everything(open_doors, until, monkeypatch):
    made = TurnCount(monkeypatch)

    async def scene():
        async with open_doors(FakeAccess(vera="viewer", otto="operator")) as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            followings = [await as_vera(doors) for _ in range(STREAMS)]
            heard = [[] for _ in followings]
            hearing = [asyncio.create_task(hear(*each)) for each in zip(followings, heard, strict=True)]
            watching = asyncio.create_task(made.watch())
            doors.tasks.tell("task-001", *(e.Output.from_bytes("stdout", b"a line\n") for _ in range(LINES)))
            async with httpx.AsyncClient(base_url=doors.http, headers={"Authorization": "Bearer otto"}) as otto:
                assert (await otto.get("/api/v1/tasks/task-001")).status_code == 200
            await until(lambda: outputs(heard) == [LINES] * STREAMS, 30)
            watching.cancel()
            for following in followings:
                await following.close()
            await asyncio.gather(*hearing)

    asyncio.run(scene())
    assert made.most <= 2 * MESSAGES_PER_TURN_MAX


def test_a_token_has_so_many_streams_of_all_tasks_and_others_their_own(open_doors, until, monkeypatch):
    monkeypatch.setattr(authenticator, "STREAMS_OF_ALL_MAX", 2)

    async def scene():
        async with open_doors(FakeAccess(vera="viewer", otto="operator")) as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            first, second = await as_vera(doors), await as_vera(doors)
            with pytest.raises(InvalidStatus) as refused:
                await as_vera(doors)
            assert refused.value.response.status_code == 429
            assert refused.value.response.headers["Retry-After"]
            async with as_vera(doors, "?task_id=task-001") as of_one:
                assert await of_one.recv()
            async with connect(doors.ws(), additional_headers={"Authorization": "Bearer otto"}):
                await first.close()
                await until(lambda: doors.open_streams("websocket") == 2)
            async with as_vera(doors):
                await second.close()

    asyncio.run(scene())


def test_many_lists_of_artifacts_of_a_token_are_made_two_at_a_time_and_others_do_not_wait(open_doors, monkeypatch):
    async def scene():
        async with open_doors(FakeAccess(vera="viewer", otto="operator")) as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            now, most, go_on = 0, 0, asyncio.Event()
            listed = doors.tasks.artifacts

            async def artifacts(task_id):
                nonlocal now, most
                now, most = now + 1, max(most, now + 1)
                await go_on.wait()
                now -= 1
                return await listed(task_id)

            monkeypatch.setattr(doors.tasks, "artifacts", artifacts)
            async with httpx.AsyncClient(base_url=doors.http, timeout=20) as client:
                path, vera, otto = (
                    "/api/v1/tasks/task-001/artifacts",
                    *({"Authorization": f"Bearer {name}"} for name in ("vera", "otto")),
                )
                asked = [asyncio.create_task(client.get(path, headers=vera)) for _ in range(20)]
                async with asyncio.timeout(10):
                    while now < THREADS_AT_ONCE_MAX:
                        await asyncio.sleep(0.01)
                assert (await client.get("/api/v1/tasks?limit=1000", headers=otto)).status_code == 200
                assert most == THREADS_AT_ONCE_MAX
                go_on.set()
                assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    asyncio.run(scene())


def test_requests_that_strangers_send_all_at_once_are_answered_in_small_parts(open_doors, until, monkeypatch):
    answered = most = now = 0
    denied = authentication._denied_response

    def counted(*arguments):
        nonlocal answered, most, now
        answered, now = answered + 1, now + 1
        most = max(most, now)
        return denied(*arguments)

    async def watch():
        nonlocal now
        while True:
            now = 0
            await asyncio.sleep(0)

    monkeypatch.setattr(authentication, "_denied_response", counted)

    async def scene():
        async with open_doors(FakeAccess(otto="operator")) as doors:
            watching = asyncio.create_task(watch())
            sent = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20
            strangers = [await asyncio.open_connection("127.0.0.1", doors.port) for _ in range(100)]
            for _, writer in strangers:
                writer.write(sent)
            async with httpx.AsyncClient(base_url=doors.http, headers={"Authorization": "Bearer otto"}) as otto:
                assert (await otto.get("/api/v1/tasks")).status_code == 200
            await until(lambda: answered == 2000, 60)
            watching.cancel()
            for _, writer in strangers:
                writer.close()

    asyncio.run(scene())
    assert most <= MESSAGES_PER_TURN_MAX


def test_many_manifests_of_a_token_are_parsed_two_at_a_time_and_others_do_not_wait(open_doors, monkeypatch):
    now, most, go_on, lock = 0, 0, threading.Event(), threading.Lock()
    parse = tasks._parse_submission

    def counted(body, *others):
        nonlocal now, most
        if body != b"slow":
            return parse(body, *others)
        with lock:
            now += 1
            most = max(most, now)
        go_on.wait(20)
        with lock:
            now -= 1
        return parse(body, *others)

    monkeypatch.setattr(tasks, "_parse_submission", counted)

    async def scene():
        async with (
            open_doors(FakeAccess(olga="operator", otto="operator")) as doors,
            httpx.AsyncClient(base_url=doors.http, timeout=20) as client,
        ):
            path, olga, otto = (
                "/api/v1/tasks?dry_run=true",
                *({"Authorization": f"Bearer {name}"} for name in ("olga", "otto")),
            )
            asked = [asyncio.create_task(client.post(path, content=b"slow", headers=olga)) for _ in range(40)]
            async with asyncio.timeout(10):
                while now < THREADS_AT_ONCE_MAX:
                    await asyncio.sleep(0.01)
                assert (await client.post(path, content=b"quick", headers=otto)).status_code == 400
            go_on.set()
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {400}
            assert most == THREADS_AT_ONCE_MAX

    asyncio.run(scene())
