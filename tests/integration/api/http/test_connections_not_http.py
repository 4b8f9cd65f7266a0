"""Requests that are not valid HTTP get a problem response."""

import asyncio
import json
import logging

import pytest

from doubles.fake_tasks import TO_RUNNING

INVALID = {
    "no host": b"GET /api/health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "invalid header": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
    "invalid request line": b"GET  /api/health\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(40) + b"\r\n\r\n",
    "endless head": b"GET /" + b"x" * 70_000,
}


async def exchange(port: int, payload: bytes) -> bytes:
    """Send bytes and read the response until the connection closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(payload)
    response = b""
    try:
        while chunk := await asyncio.wait_for(reader.read(65536), 10):
            response += chunk
    except ConnectionResetError:  # the server closed the connection with unread input
        pass
    finally:
        writer.close()
    return response


@pytest.mark.parametrize("port_name", ["port", "websocket_port"])
@pytest.mark.parametrize("payload", INVALID.values(), ids=INVALID)
async def test_invalid_http_gets_a_problem_response(running_api, caplog, payload, port_name):
    async def scenario():
        async with running_api() as api:
            return await exchange(getattr(api, port_name), payload)

    with caplog.at_level(logging.INFO, "sandbox"):
        head, _, body = (await scenario()).partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "http/1.1 400 bad request"
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-length"] == str(len(body))
    problem = json.loads(body)
    assert (problem["error"], problem["status"]) == ("bad_request", 400)
    assert (problem["title"], problem["instance"]) == ("Bad Request", "")
    assert "RFC 9112" in problem["message"]
    assert problem["request_id"] == headers["x-request-id"]
    (line,) = [record for record in caplog.records if record.getMessage() == "Rejected a malformed HTTP request"]
    assert line.request_id == problem["request_id"]


async def test_error_response_to_head_has_no_body(running_api, caplog):
    async def scenario():
        async with running_api() as api:
            head = b"HEAD /api/health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            return await exchange(api.port, head + b"no chunk\r\n")

    head, _, body = (await scenario()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert body == b""
    assert not [record for record in caplog.records if record.exc_info]


async def test_valid_requests_before_an_invalid_one_are_answered(running_api):
    async def scenario():
        async with running_api() as api:
            valid = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            return await exchange(api.port, valid + INVALID["invalid header"])

    response = await scenario()
    assert response.startswith(b"HTTP/1.1 200 OK")
    assert response.count(b"HTTP/1.1 400 Bad Request") == 1


async def test_invalid_body_after_the_response_gets_no_second_response(running_api, caplog):
    async def scenario():
        async with running_api() as api:
            api.tasks.add("task-001", *TO_RUNNING)
            head = b"GET /api/v1/tasks/task-001/logs?follow=true HTTP/1.1\r\nHost: localhost\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            response = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            writer.write(b"no chunk\r\n")
            response += await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return response

    response = await scenario()
    assert response.startswith(b"HTTP/1.1 200 OK")
    assert b"400 Bad Request" not in response
    assert not [record for record in caplog.records if record.exc_info]


HANDSHAKE = (
    b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CLOSE_1000 = b"\x88\x82\0\0\0\0\x03\xe8"


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (b"\x81\x81\0\0\0\0\xff", 1007),
        (b"\x01\x81\0\0\0\0\xc3" + b"\x80\x81\0\0\0\0\x28", 1007),
        (b"\x01\x81\0\0\0\0\xc3" + b"\x80\x81\0\0\0\0\xa9" + CLOSE_1000, 1000),
        (b"\x82\x81\0\0\0\0\xff" + CLOSE_1000, 1000),
    ],
    ids=["not UTF-8", "not UTF-8 in fragments", "UTF-8 in fragments", "bytes"],
)
async def test_message_that_is_not_text_closes_the_connection_without_a_server_error(running_api, caplog, frames, code):
    async with running_api() as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.websocket_port)
        writer.write(HANDSHAKE)
        assert b" 101 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.write(frames)
        assert code.to_bytes(2) in await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
