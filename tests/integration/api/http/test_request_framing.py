"""To prevent request smuggling, both ports reject requests with ambiguous framing and close the connection."""

import asyncio
import json
import re
import shutil

import pytest

from doubles.fake_tasks import TO_RUNNING
from sandbox.api.http import connections

HEALTH = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/yaml\r\n"
HANDSHAKE = (
    b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
AMBIGUOUS = {
    "transfer encoding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "length and transfer encoding": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "repeated length": POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "list of lengths": POST + b"Content-Length: 1, 1\r\n\r\nx",
    "transfer encoding in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "transfer encoding after a tab": POST + b"Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n",
    "LF instead of CRLF": HEALTH.replace(b"\r\n", b"\n"),
    "folded line": HEALTH.replace(b"localhost", b"localhost\r\nX: a\r\n b"),
    "control character": HEALTH.replace(b"localhost", b"localhost\r\nX: a\x01b"),
    "HTTP/3.0": HEALTH.replace(b"1.1", b"3.0"),
    "chunk extension with CR": POST + b"Transfer-Encoding: chunked\r\n\r\n1;a\rb\r\nx\r\n0\r\n\r\n",
    "space after the chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\n",
    "trailer with LF": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: a\n\n",
    "handshake with a body": HANDSHAKE + b"Content-Length: 5\r\n\r\nhello",
    "chunked handshake": HANDSHAKE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "handshake in HTTP/1.0": HANDSHAKE.replace(b"1.1", b"1.0") + b"\r\n",
    "handshake with too many fields": HANDSHAKE + b"X: y\r\n" * 130 + b"\r\n",
    "handshake with too long a field": HANDSHAKE + b"X: " + b"y" * 8200 + b"\r\n\r\n",
}
on_both_ports = pytest.mark.parametrize("port_name", ["port", "websocket_port"])


async def exchange(port: int, *payloads: bytes) -> bytes:
    """Send bytes and read the responses until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    response = b""
    try:
        for payload in payloads:
            writer.write(payload)
            await asyncio.sleep(0.05 if len(payloads) > 1 else 0)
        while chunk := await asyncio.wait_for(reader.read(65536), 4):
            response += chunk
    except ConnectionError:  # the server closed the connection with unread input
        pass
    finally:
        writer.close()
    return response


@on_both_ports
@pytest.mark.parametrize("payload", AMBIGUOUS.values(), ids=AMBIGUOUS)
async def test_ambiguous_request_is_rejected_and_closes_the_connection(running_api, payload, port_name):
    async def scenario():
        async with running_api() as api:
            together = await exchange(getattr(api, port_name), payload + HEALTH)
            separate = await exchange(getattr(api, port_name), payload, HEALTH)
            return together, separate, list(api.tasks.entries)

    together, separate, submitted = await scenario()
    for response in (together, separate):
        head, _, body = response.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"connection: close" in head.lower()
        assert len(statuses(response)) == 1
        problem = json.loads(body)
        assert (problem["error"], problem["status"]) == ("bad_request", 400)
    assert not submitted


@on_both_ports
async def test_earlier_requests_are_answered_in_order(running_api, port_name):
    async def scenario():
        async with running_api() as api:
            return await exchange(
                getattr(api, port_name), HEALTH + HEALTH + AMBIGUOUS["transfer encoding and length"] + HEALTH
            )

    assert statuses(await scenario()) == [b"200" if port_name == "port" else b"404"] * 2 + [b"400"]


async def test_rejection_does_not_replace_a_pending_response(running_api):
    async def scenario():
        async with running_api() as api:
            api.tasks.add("task-001", *TO_RUNNING)
            wait = b"GET /api/v1/tasks/task-001/wait?timeout=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            return await exchange(api.port, wait, AMBIGUOUS["repeated length"])

    first, second = (await scenario()).split(b"HTTP/1.1 ")[1:]
    assert (first[:3], second[:3]) == (b"200", b"400")
    assert b'"running"' in first


async def test_requests_after_a_connection_close_header_are_ignored(running_api):
    async def scenario():
        async with running_api() as api:
            last = HEALTH.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n")
            return await exchange(api.port, last + AMBIGUOUS["repeated length"] + HEALTH)

    response = await scenario()
    assert response.startswith(b"HTTP/1.1 200 OK")
    assert len(statuses(response)) == 1


async def test_rejected_request_with_expect_continue_closes_the_connection(running_api):
    async def scenario():
        async with running_api() as api:
            request = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 52\r\n\r\n"
            return await exchange(api.port, request, HEALTH + HEALTH)

    response = await scenario()
    assert response.startswith(b"HTTP/1.1 404 Not Found")
    assert b"connection: close" in response.lower()
    assert len(statuses(response)) == 1


async def test_body_sent_after_the_response_times_out(running_api, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_SECONDS", 1.0)
    async with running_api() as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n")
        assert b" 404 " in await asyncio.wait_for(reader.readline(), 5)

        async def trickle():
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        try:
            await asyncio.wait_for(reader.read(), 4)
        except ConnectionError:
            pass
        finally:
            trickling.cancel()
            writer.close()


def statuses(response: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", response)


MANIFEST = b"""version: "1"
kind: Task
metadata: {name: Twin}
repository: {url: "https://example.org/a.git", branch: main}
claude: {prompt: Work.}
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--data-binary", "@-"],
        ["--data-binary", "@-", "-H", "Transfer-Encoding: chunked"],
        ["-T", "-"],
        ["--data-binary", "@-", "-H", "Expect: 100-continue"],
        ["-T", "-", "-H", "Expect: 100-continue"],
        ["--data-binary", "@-", "--http1.0"],
        ["--data-binary", "@-", "--http2"],
    ],
    ids=" ".join,
)
async def test_curl_can_submit_with_every_framing(running_api, options):
    curl = shutil.which("curl")
    assert curl is not None

    async def scenario():
        async with running_api() as api:
            url = f"http://localhost:{api.port}/api/v1/tasks"
            command = [curl, "-sS", "-X", "POST", "-H", "Content-Type: application/yaml", *options, url]
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await asyncio.wait_for(process.communicate(MANIFEST), 20)
            return process.returncode, json.loads(output)

    code, task = await scenario()
    assert (code, task["state"]) == (0, "pending")


async def test_requests_with_bodies_share_a_connection(running_api):
    async def scenario():
        async with running_api() as api:
            plain = POST + b"Content-Length: %d\r\n\r\n" % len(MANIFEST) + MANIFEST
            chunks = b"%x;a=b\r\n" % len(MANIFEST) + MANIFEST + b"\r\n0\r\nX-Checksum: abc\r\n\r\n"
            chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
            last = HEALTH.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n")
            return await exchange(api.port, plain + chunked + HEALTH + plain, chunked[:90], chunked[90:], last)

    assert statuses(await scenario()) == [b"202", b"202", b"200", b"202", b"202", b"200"]
