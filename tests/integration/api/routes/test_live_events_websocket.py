"""The task stream over WebSocket."""

import asyncio
import json

import httpx2
import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import server
from sandbox.api.routes.live_events import FRAGMENT_BYTES_MAX
from sandbox.model import events as e


async def read_remaining(socket):
    """Return the remaining messages and the close code."""
    messages = [json.loads(message) async for message in socket]
    return messages, socket.close_code


async def test_stream_starts_with_the_current_state(running_api):
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        for port in (api.websocket_port, api.port):
            async with connect(api.ws("?task_id=task-001", port=port)) as socket:
                first = json.loads(await socket.recv())
                assert (first["type"], first["previous_state"], first["new_state"], first["seq"]) == (
                    "state_change",
                    None,
                    "running",
                    5,
                )


async def test_stream_sends_all_events_and_closes_at_the_end(running_api):
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        async with connect(api.ws("?task_id=task-001&after=3")) as socket:
            api.tasks.record(
                "task-001", e.Output.from_bytes("stdout", "grüß\n".encode()), e.Progress(turns=1), *TO_COMPLETED
            )
            received, code = await read_remaining(socket)
        assert [(event["seq"], event["type"]) for event in received] == [
            (4, "state_change"),
            (5, "state_change"),
            (6, "output"),
            (7, "progress"),
            (8, "state_change"),
            (9, "state_change"),
            (10, "end"),
        ]
        assert (received[2]["data"], received[2]["bytes"]) == ("grüß\n", 7)
        assert code == 1000


async def test_large_event_is_sent_in_fragments_of_whole_characters(running_api):
    """If it were sent whole, the server would keep several copies of the event for each client that does not read."""
    text = "😀é€a" * 40_000 + "\n"
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING, e.Output.from_bytes("stdout", text.encode()), *TO_COMPLETED)
        async with connect(api.ws("?task_id=task-001&after=0&filter=output")) as socket:
            fragments = [each async for each in socket.recv_streaming(decode=False)]
            following = json.loads(await socket.recv())
    assert len(fragments) > 3
    assert all(0 < len(each.decode()) <= len(each) <= FRAGMENT_BYTES_MAX for each in fragments)
    assert (json.loads(b"".join(fragments))["data"], following["type"]) == (text, "end")


async def test_gap_and_end_events_are_not_filtered_out(running_api):
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING, e.Gap(0, 0, "disk full"), e.Progress(), *TO_COMPLETED)
        async with connect(api.ws("?task_id=task-001&after=0&filter=output,progress")) as socket:
            received, _ = await read_remaining(socket)
        assert [event["type"] for event in received] == ["gap", "progress", "end"]


async def test_stream_of_all_tasks_misses_nothing_after_the_handshake(running_api):
    async with running_api() as api:
        for number in range(10):
            async with connect(api.ws()) as socket:
                api.tasks.add(f"task-{number}")
                event = json.loads(await asyncio.wait_for(socket.recv(), 5))
                assert (event["task_id"], event["new_state"]) == (f"task-{number}", "pending")


async def test_disconnect_is_detected_and_client_messages_are_ignored(running_api, wait_until):
    async with running_api() as api:
        api.tasks.add("task-001")
        async with connect(api.ws("?task_id=task-001")) as socket, connect(api.ws()) as other:
            await wait_until(lambda: api.tasks.open_followers == 1 and len(api.tasks.subscribers) == 1)
            for _ in range(50):
                await socket.send("whatever")
                await other.send(b"\x00")
            api.tasks.record("task-001", e.ErrorReported("slow", "Slow."))
            await other.recv()
            assert json.loads(await socket.recv())["type"] == "state_change"
            assert json.loads(await socket.recv())["type"] == "error"
        await wait_until(lambda: api.tasks.open_followers == 0 and not api.tasks.subscribers)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/v1/tasks/stream", "This is a WebSocket endpoint"),
        ("/api/v1/tasks/task-001/terminal", "This is a WebSocket endpoint"),
        ("/api/v1/tasks/task-001/elsewhere", "No such endpoint"),
    ],
)
async def test_plain_http_request_gets_an_explanation(running_api, path, expected):
    async with running_api() as api, httpx2.AsyncClient(trust_env=False) as client:
        response = await client.get(f"http://localhost:{api.websocket_port}{path}")
        assert (response.status_code, response.json()["error"]) == (404, "not_found")
        assert response.json()["message"].startswith(expected)


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
async def test_invalid_query_rejects_the_handshake(running_api, query, status, code):
    async with running_api() as api:
        api.tasks.add("task-001")
        for port in (api.websocket_port, api.port):
            with pytest.raises(InvalidStatus) as raised:
                await connect(api.ws(query, port=port))
            response = raised.value.response
            assert (response.status_code, json.loads(response.body)["error"]) == (status, code)


async def test_foreign_origin_is_rejected_and_same_origin_is_accepted(running_api):
    async with running_api() as api:
        for port in (api.websocket_port, api.port):
            with pytest.raises(InvalidStatus) as raised:
                await connect(api.ws(port=port), origin="https://evil.example")
            assert raised.value.response.status_code == 403
            async with connect(api.ws(port=port), origin=websockets.Origin(api.http)):
                pass


async def test_unknown_path_on_the_stream_port_is_not_found(running_api):
    async with running_api() as api:
        with pytest.raises(InvalidStatus) as raised:
            await connect(f"ws://localhost:{api.websocket_port}/elsewhere")
        assert raised.value.response.status_code == 404


async def test_gap_in_the_stream_of_all_tasks_is_not_filtered_out(running_api, wait_until):
    gap = {"type": "gap", "task_id": "task-001", "seq": 9, "first_seq": 7, "last_seq": 9, "reason": "slow_client"}
    async with running_api() as api, connect(api.ws("?filter=output")) as socket:
        await wait_until(lambda: len(api.tasks.subscribers) == 1)
        api.tasks.add("task-001", *TO_RUNNING)
        api.tasks.subscribers[0].put_nowait(gap)
        assert json.loads(await asyncio.wait_for(socket.recv(), 5)) == gap


async def test_connection_without_pong_is_closed(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(server, "PING_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(server, "PONG_TIMEOUT_SECONDS", 0.1)
    async with running_api() as api:
        api.tasks.add("task-001")
        async with connect(api.ws("?task_id=task-001")) as responsive:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.websocket_port)
            writer.write(
                b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
            )
            assert b"101" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            await asyncio.wait_for(reader.read(), 5)
            await wait_until(lambda: not api.tasks.subscribers)
            api.tasks.record("task-001", e.ErrorReported("slow", "Slow."))
            assert json.loads(await responsive.recv())["type"] == "state_change"
            assert json.loads(await asyncio.wait_for(responsive.recv(), 5))["type"] == "error"
        writer.close()
