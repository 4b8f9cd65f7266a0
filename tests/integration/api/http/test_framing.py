"""A request that two servers could end at different places is refused on both ports, and its connection ends."""

import asyncio
import json
import re
import shutil

import pytest

from doubles.fake_tasks import TO_RUNNING
from sandbox.api.http import protocols

HEALTH = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/yaml\r\n"
HANDSHAKE = (
    b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
AMBIGUOUS = {
    "a coding and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "a length and a coding": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "one length twice": POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "a list of lengths": POST + b"Content-Length: 1, 1\r\n\r\nx",
    "a coding in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding behind a tab": POST + b"Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n",
    "LF for CRLF": HEALTH.replace(b"\r\n", b"\n"),
    "a folded line": HEALTH.replace(b"localhost", b"localhost\r\nX: a\r\n b"),
    "a control character": HEALTH.replace(b"localhost", b"localhost\r\nX: a\x01b"),
    "HTTP/3.0": HEALTH.replace(b"1.1", b"3.0"),
    "an extension with CR": POST + b"Transfer-Encoding: chunked\r\n\r\n1;a\rb\r\nx\r\n0\r\n\r\n",
    "a chunk's size before a space": POST + b"Transfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\n",
    "a trailer with LF": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: a\n\n",
    "a handshake with a body": HANDSHAKE + b"Content-Length: 5\r\n\r\nhello",
    "a handshake in chunks": HANDSHAKE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a handshake in HTTP/1.0": HANDSHAKE.replace(b"1.1", b"1.0") + b"\r\n",
    "a handshake with too many fields": HANDSHAKE + b"X: y\r\n" * 130 + b"\r\n",
    "a handshake with too long a field": HANDSHAKE + b"X: " + b"y" * 8200 + b"\r\n\r\n",
}
on_both_ports = pytest.mark.parametrize("door", ["port", "stream_port"])


async def answers(port: int, *sent: bytes) -> bytes:
    """Everything that is answered until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        for piece in sent:
            writer.write(piece)
            await asyncio.sleep(0.05 if len(sent) > 1 else 0)
        while more := await asyncio.wait_for(reader.read(65536), 4):
            answer += more
    except ConnectionError:  # for what it had not read
        pass
    finally:
        writer.close()
    return answer


@on_both_ports
@pytest.mark.parametrize("sent", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_it_is_refused_and_what_is_hidden_behind_it_is_never_answered(open_doors, sent, door):
    async def scene():
        async with open_doors() as doors:
            together = await answers(getattr(doors, door), sent + HEALTH)
            apart = await answers(getattr(doors, door), sent, HEALTH)
            return together, apart, list(doors.tasks.stories)

    together, apart, submitted = asyncio.run(scene())
    for answer in (together, apart):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"connection: close" in head.lower()
        assert len(statuses(answer)) == 1
        told = json.loads(body)
        assert (told["error"], told["status"]) == ("bad_request", 400)
    assert not submitted


@on_both_ports
def test_the_requests_before_it_are_answered_in_their_order(open_doors, door):
    async def scene():
        async with open_doors() as doors:
            return await answers(getattr(doors, door), HEALTH + HEALTH + AMBIGUOUS["a coding and a length"] + HEALTH)

    assert statuses(asyncio.run(scene())) == [b"200" if door == "port" else b"404"] * 2 + [b"400"]


def test_a_refused_request_does_not_take_the_place_of_an_answer_under_way(open_doors):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            wait = b"GET /api/v1/tasks/task-001/wait?timeout=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            return await answers(doors.port, wait, AMBIGUOUS["one length twice"])

    first, second = asyncio.run(scene()).split(b"HTTP/1.1 ")[1:]
    assert (first[:3], second[:3]) == (b"200", b"400")
    assert b'"running"' in first


def test_nothing_is_answered_behind_the_last_request_of_a_connection(open_doors):
    async def scene():
        async with open_doors() as doors:
            last = HEALTH.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n")
            return await answers(doors.port, last + AMBIGUOUS["one length twice"] + HEALTH)

    answer = asyncio.run(scene())
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert len(statuses(answer)) == 1


def test_who_was_not_told_to_send_a_body_is_not_taken_for_sending_one(open_doors):
    async def scene():
        async with open_doors() as doors:
            refused = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 52\r\n\r\n"
            return await answers(doors.port, refused, HEALTH + HEALTH)

    answer = asyncio.run(scene())
    assert answer.startswith(b"HTTP/1.1 404 Not Found")
    assert b"connection: close" in answer.lower()
    assert len(statuses(answer)) == 1


def test_a_body_that_goes_on_behind_its_answer_ends_in_time(open_doors, monkeypatch):
    monkeypatch.setattr(protocols, "HEAD_TIMEOUT_SECONDS", 1.0)

    async def scene():
        async with open_doors() as doors:
            reader, writer = await asyncio.open_connection("127.0.0.1", doors.port)
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

    asyncio.run(scene())


def statuses(answered: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answered)


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
def test_curl_submits_in_every_way(open_doors, options):
    curl = shutil.which("curl")
    assert curl is not None

    async def scene():
        async with open_doors() as doors:
            url = f"http://localhost:{doors.port}/api/v1/tasks"
            command = [curl, "-sS", "-X", "POST", "-H", "Content-Type: application/yaml", *options, url]
            ran = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            said, _ = await asyncio.wait_for(ran.communicate(MANIFEST), 20)
            return ran.returncode, json.loads(said)

    code, told = asyncio.run(scene())
    assert (code, told["state"]) == (0, "pending")


def test_requests_with_bodies_share_a_connection(open_doors):
    async def scene():
        async with open_doors() as doors:
            plain = POST + b"Content-Length: %d\r\n\r\n" % len(MANIFEST) + MANIFEST
            chunks = b"%x;a=b\r\n" % len(MANIFEST) + MANIFEST + b"\r\n0\r\nX-Checksum: abc\r\n\r\n"
            chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
            last = HEALTH.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n")
            return await answers(doors.port, plain + chunked + HEALTH + plain, chunked[:90], chunked[90:], last)

    assert statuses(asyncio.run(scene())) == [b"202", b"202", b"200", b"202", b"202", b"200"]
