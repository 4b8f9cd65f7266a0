"""Somebody sends what is no HTTP, and is told so as of every other mistake."""

import asyncio
import json
import logging

import pytest

from doubles.fake_tasks import TO_RUNNING

BROKEN = {
    "no host": b"GET /api/health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "a broken header": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
    "a broken first line": b"GET  /api/health\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(40) + b"\r\n\r\n",
    "a head without an end": b"GET /" + b"x" * 70_000,
}


async def said(port: int, sent: bytes) -> bytes:
    """Everything that is answered, to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    answer = b""
    try:
        while more := await asyncio.wait_for(reader.read(65536), 10):
            answer += more
    except ConnectionResetError:  # for what it had not read
        pass
    finally:
        writer.close()
    return answer


@pytest.mark.parametrize("door", ["port", "stream_port"])
@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_no_http_is_refused_in_the_shape_of_every_error(open_doors, caplog, sent, door):
    async def scene():
        async with open_doors() as doors:
            return await said(getattr(doors, door), sent)

    with caplog.at_level(logging.INFO, "sandbox"):
        head, _, body = asyncio.run(scene()).partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "http/1.1 400 bad request"
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-length"] == str(len(body))
    told = json.loads(body)
    assert (told["error"], told["status"], told["title"], told["instance"]) == ("bad_request", 400, "Bad Request", "")
    assert "RFC 9112" in told["message"]
    assert told["request_id"] == headers["x-request-id"]
    (line,) = [record for record in caplog.records if record.getMessage() == "Refused what is no HTTP"]
    assert line.request_id == told["request_id"]


def test_an_answer_to_head_has_no_body_whatever_is_wrong(open_doors, caplog):
    async def scene():
        async with open_doors() as doors:
            head = b"HEAD /api/health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            return await said(doors.port, head + b"no chunk\r\n")

    head, _, body = asyncio.run(scene()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert body == b""
    assert not [record for record in caplog.records if record.exc_info]


def test_proper_requests_before_it_are_answered(open_doors):
    async def scene():
        async with open_doors() as doors:
            proper = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            return await said(doors.port, proper + BROKEN["a broken header"])

    answer = asyncio.run(scene())
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1 400 Bad Request") == 1


def test_a_body_that_breaks_after_its_answer_gets_no_second_one(open_doors, caplog):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            head = b"GET /api/v1/tasks/task-001/logs?follow=true HTTP/1.1\r\nHost: localhost\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", doors.port)
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            writer.write(b"no chunk\r\n")
            answer += await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer

    answer = asyncio.run(scene())
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"400 Bad Request" not in answer
    assert not [record for record in caplog.records if record.exc_info]
