"""Memory for a response is reserved from the client's share before its head is sent, and released after its body."""

import asyncio
import json

import pytest

from sandbox.api.client_limits import respond_within_memory
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import FairShare, MemoryShare

CHUNK_BYTES = 65_536
SOCKET_BYTES = 131_072
SMALL_BYTES = 4096
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
STREAM_START = {"type": "http.response.start", "status": 200, "headers": []}
ACCEPT = {"type": "websocket.accept"}


class Client:
    """Receives a response, and records how much memory is reserved for each message."""

    def __init__(self, bytes_max=2**40):
        self.memory = MemoryShare(bytes_max)
        self.messages = []
        self.reserved_bytes = []
        self.closed_count = 0
        self.is_stalled = False

    async def send(self, message):
        self.messages.append(message)
        self.reserved_bytes.append(self.memory.reserved_bytes)
        if self.is_stalled:
            self.memory._monotonic = lambda: float("inf")
            self.memory._close_stalled()

    async def request(self, *messages, is_websocket=False):
        """Make the app respond with these messages; return how many of them it could send."""
        sent_count = 0

        async def app(_scope, _receive, send):
            nonlocal sent_count
            for message in messages:
                await send(message)
                sent_count += 1

        def close():
            self.closed_count += 1

        scope = {"type": "websocket" if is_websocket else "http", "path": "/", "headers": [], "state": {"abort": close}}
        await respond_within_memory(app, scope, None, self.send, self.memory)
        return sent_count

    @property
    def bodies(self):
        return [message["body"] for message in self.messages if message["type"] == "http.response.body"]


def body(content, **fields):
    return {"type": "http.response.body", "body": content, **fields}


async def test_body_is_sent_in_chunks_and_its_memory_is_reserved_until_the_last_one():
    client, content = Client(), bytes(range(256)) * 600
    await client.request(START, body(content))
    assert [len(each) for each in client.bodies] == [CHUNK_BYTES, CHUNK_BYTES, len(content) - 2 * CHUNK_BYTES]
    assert b"".join(client.bodies) == content
    assert [message.get("more_body") for message in client.messages] == [None, True, True, False]
    assert client.reserved_bytes == [len(content), *([len(content) + SOCKET_BYTES] * 3)]
    assert client.memory.reserved_bytes == 0


async def test_body_of_exactly_one_chunk_is_the_last_one():
    client = Client()
    await client.request(START, body(bytes(CHUNK_BYTES)))
    assert [message.get("more_body") for message in client.messages] == [None, False]


async def test_part_of_a_stream_is_followed_by_more():
    client = Client()
    await client.request(STREAM_START, body(bytes(CHUNK_BYTES + 1), more_body=True), body(b"end"), body(b""))
    assert [message["more_body"] for message in client.messages[1:]] == [True, True, False, False]
    assert [len(each) for each in client.bodies] == [CHUNK_BYTES, 1, 3, 0]


async def test_missing_body_is_sent_as_an_empty_one():
    client = Client()
    await client.request(START, {"type": "http.response.body"})
    assert client.bodies == [b""]
    assert client.reserved_bytes == [0, SOCKET_BYTES]


@pytest.mark.parametrize(("size_bytes", "is_refused"), [(SMALL_BYTES, False), (SMALL_BYTES + 1, True)])
async def test_large_response_is_refused_if_no_memory_is_left(size_bytes, is_refused):
    client = Client(bytes_max=1000)
    client.memory.force_reserve(900)
    sent_count = await client.request(START, body(bytes(size_bytes)))
    assert (client.messages[0]["status"], sent_count) == ((429, 1) if is_refused else (200, 2))
    if is_refused:
        assert json.loads(b"".join(client.bodies))["error"] == "response_memory_exceeded"
    assert client.memory.reserved_bytes == 900


async def test_request_is_refused_if_all_memory_is_used():
    client = Client(bytes_max=1000)
    client.memory.force_reserve(1001)
    assert await client.request(START, body(b"x")) == 0
    assert client.messages[0]["status"] == 429


async def test_part_of_a_stream_is_sent_even_if_no_memory_is_left():
    client = Client(bytes_max=1000)
    client.memory.force_reserve(900)
    assert await client.request(STREAM_START, body(bytes(CHUNK_BYTES), more_body=True), body(b"")) == 3
    assert client.reserved_bytes[1] == 900 + CHUNK_BYTES + SOCKET_BYTES


@pytest.mark.parametrize(
    ("content", "size_bytes"),
    [
        ({"bytes": b"x" * 5000}, 5000),
        ({"text": "x" * 5000}, 5041),  # the characters and the header of the string
        ({"text": "\N{ROCKET}" * 5000}, 20_060),
        ({"bytes": None, "text": ""}, 41),
        ({"bytes": b""}, 0),
    ],
)
async def test_websocket_message_reserves_its_size_in_memory(content, size_bytes):
    client, message = Client(), {"type": "websocket.send", **content}
    await client.request(ACCEPT, message, is_websocket=True)
    assert client.messages == [ACCEPT, message]
    assert client.reserved_bytes == [0, pytest.approx(size_bytes + SOCKET_BYTES, abs=40)]
    assert client.memory.reserved_bytes == 0


async def test_stalled_connection_is_closed_when_its_client_needs_memory():
    client = Client()
    client.is_stalled = True
    await client.request(START, body(b"x"))
    assert client.closed_count == 1


async def test_response_waits_for_the_turn_of_its_client():
    client, share = Client(), FairShare()
    share._messages_left = 0
    fair_client_shares.set_current_share(share)
    response = asyncio.create_task(client.request(START, body(bytes(3 * CHUNK_BYTES))))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert client.bodies == []
    await response
    assert len(client.bodies) == 3
