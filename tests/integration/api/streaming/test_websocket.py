"""A page or a program watches tasks over the WebSocket."""

import asyncio
import json

import httpx
import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import server
from sandbox.model import events as e


async def rest(socket):
    """Everything until the server closes, and its close code."""
    told = [json.loads(message) async for message in socket]
    return told, socket.close_code


def test_the_story_from_now_begins_with_the_present_state(open_doors):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            for port in (doors.stream_port, doors.port):
                async with connect(doors.ws("?task_id=task-001", port=port)) as socket:
                    first = json.loads(await socket.recv())
                    assert (first["type"], first["previous_state"], first["new_state"], first["seq"]) == (
                        "state_change",
                        None,
                        "running",
                        5,
                    )

    asyncio.run(scene())


def test_a_task_is_told_to_its_end_and_the_socket_closed(open_doors):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            async with connect(doors.ws("?task_id=task-001&after=3")) as socket:
                doors.tasks.tell(
                    "task-001", e.Output.from_bytes("stdout", "grüß\n".encode()), e.Progress(turns=1), *TO_COMPLETED
                )
                told, code = await rest(socket)
            assert [(frame["seq"], frame["type"]) for frame in told] == [
                (4, "state_change"),
                (5, "state_change"),
                (6, "output"),
                (7, "progress"),
                (8, "state_change"),
                (9, "state_change"),
                (10, "end"),
            ]
            assert (told[2]["data"], told[2]["bytes"]) == ("grüß\n", 7)
            assert code == 1000

    asyncio.run(scene())


def test_a_filter_lets_gap_and_end_pass(open_doors):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING, e.Gap(0, 0, "disk full"), e.Progress(), *TO_COMPLETED)
            async with connect(doors.ws("?task_id=task-001&after=0&filter=output,progress")) as socket:
                told, _ = await rest(socket)
            assert [frame["type"] for frame in told] == ["gap", "progress", "end"]

    asyncio.run(scene())


def test_who_has_shaken_hands_misses_nothing_of_any_task(open_doors):
    async def scene():
        async with open_doors() as doors:
            for number in range(10):
                async with connect(doors.ws()) as socket:
                    doors.tasks.add(f"task-{number}")
                    frame = json.loads(await asyncio.wait_for(socket.recv(), 5))
                    assert (frame["task_id"], frame["new_state"]) == (f"task-{number}", "pending")

    asyncio.run(scene())


def test_who_leaves_is_noticed_at_once_and_what_he_says_is_ignored(open_doors, until):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001")
            async with connect(doors.ws("?task_id=task-001")) as socket, connect(doors.ws()) as other:
                await until(lambda: doors.tasks.open_followers == 1 and len(doors.tasks.subscribers) == 1)
                for _ in range(50):
                    await socket.send("whatever")
                    await other.send(b"\x00")
                doors.tasks.tell("task-001", e.ErrorReported("slow", "Slow."))
                await other.recv()
                assert json.loads(await socket.recv())["type"] == "state_change"
                assert json.loads(await socket.recv())["type"] == "error"
            await until(lambda: doors.tasks.open_followers == 0 and not doors.tasks.subscribers)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/v1/tasks/stream", "Here is a WebSocket, and the request did not ask for one"),
        ("/api/v1/tasks/task-001/terminal", "Here is a WebSocket, and the request did not ask for one"),
        ("/api/v1/tasks/task-001/elsewhere", "There is nothing at this address"),
    ],
)
def test_who_asks_a_websocket_for_a_page_hears_what_it_is(open_doors, path, words):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://localhost:{doors.stream_port}{path}")
            assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
            assert answer.json()["message"].startswith(words)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?task_id=nobody", 404, "task_not_found"),
        ("?filter=state_change,everything", 400, "invalid_parameter"),
        ("?task_id=task-001&after=-1", 400, "invalid_parameter"),
        ("?after=1", 400, "invalid_parameter"),
        ("?taskid=task-001", 400, "invalid_parameter"),
    ],
)
def test_a_wish_that_cannot_be_is_answered_in_the_handshake(open_doors, query, status, code):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001")
            for port in (doors.stream_port, doors.port):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(doors.ws(query, port=port))
                response = refused.value.response
                assert (response.status_code, json.loads(response.body)["error"]) == (status, code)

    asyncio.run(scene())


def test_a_page_of_another_site_is_not_let_in_and_one_of_this_server_is(open_doors):
    async def scene():
        async with open_doors() as doors:
            for port in (doors.stream_port, doors.port):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(doors.ws(port=port), origin="https://evil.example")
                assert refused.value.response.status_code == 403
                async with connect(doors.ws(port=port), origin=websockets.Origin(doors.http)):
                    pass

    asyncio.run(scene())


def test_another_address_of_the_stream_port_is_not_found(open_doors):
    async def scene():
        async with open_doors() as doors:
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://localhost:{doors.stream_port}/elsewhere")
            assert refused.value.response.status_code == 404

    asyncio.run(scene())


def test_a_gap_in_the_story_of_all_tasks_passes_every_filter(open_doors, until):
    gap = {"type": "gap", "task_id": "task-001", "seq": 9, "first_seq": 7, "last_seq": 9, "reason": "slow_client"}

    async def scene():
        async with open_doors() as doors, connect(doors.ws("?filter=output")) as socket:
            await until(lambda: len(doors.tasks.subscribers) == 1)
            doors.tasks.add("task-001", *TO_RUNNING)
            doors.tasks.subscribers[0].put_nowait(gap)
            assert json.loads(await asyncio.wait_for(socket.recv(), 5)) == gap

    asyncio.run(scene())


def test_who_answers_no_ping_is_gone_and_who_answers_stays(open_doors, until, monkeypatch):
    monkeypatch.setattr(server, "PING_SECONDS", 0.05)
    monkeypatch.setattr(server, "PONG_SECONDS", 0.1)

    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001")
            async with connect(doors.ws("?task_id=task-001")) as answering:
                reader, writer = await asyncio.open_connection("127.0.0.1", doors.stream_port)
                writer.write(
                    b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
                )
                assert b"101" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
                await asyncio.wait_for(reader.read(), 5)
                await until(lambda: not doors.tasks.subscribers)
                doors.tasks.tell("task-001", e.ErrorReported("slow", "Slow."))
                assert json.loads(await answering.recv())["type"] == "state_change"
                assert json.loads(await asyncio.wait_for(answering.recv(), 5))["type"] == "error"
            writer.close()

    asyncio.run(scene())
