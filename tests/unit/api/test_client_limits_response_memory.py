"""A response is sent in chunks, and its memory is counted until the client has it. Without memory, it becomes a 429."""

import json
import sys
from collections.abc import MutableMapping
from typing import Any

import pytest

from sandbox.api.client_limits import respond_within_memory
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import FairShare, MemoryShare

CHUNK_BYTES, SOCKET_BYTES, SMALL_BYTES = 64 * 1024, 128 * 1024, 4096
LIMIT_BYTES = 100_000
Message = MutableMapping[str, Any]


class RecordingShare(FairShare):
    """A share of the event loop that never waits."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []

    async def wait_for_turn(self, size_bytes: int) -> None:
        self.turns.append(size_bytes)


class Client:
    """A client that reads everything, and notes how much memory is reserved while it does."""

    def __init__(self, used_bytes: int = 0, **state: Any) -> None:
        self.memory = MemoryShare(LIMIT_BYTES)
        self.memory.force_reserve(used_bytes)
        self.received: list[Message] = []
        self.reserved_bytes: list[int] = []
        self.closing: list[Any] = []
        self.app_errors: list[OSError] = []
        self.share = RecordingShare()
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [],
            "state": state,
        }

    async def receive(self) -> Message:
        raise AssertionError("no response needs the request's body")

    async def send(self, message: Message) -> None:
        self.received.append(message)
        self.reserved_bytes.append(self.memory.reserved_bytes)
        self.closing.append([close for _, close in self.memory._sending.values()])

    async def request(self, *messages: Message) -> None:
        """Call an app that responds with these messages."""

        async def app(scope, receive, send) -> None:
            assert (scope, receive) == (self.scope, self.receive)
            try:
                for message in messages:
                    await send(message)
            except OSError as error:
                self.app_errors.append(error)
                raise

        fair_client_shares.set_current_share(self.share)
        await respond_within_memory(app, self.scope, self.receive, self.send, self.memory)

    def check_was_refused(self) -> None:
        head, body = self.received
        headers = dict(head["headers"])
        error = json.loads(body["body"])
        assert (head["status"], error["error"]) == (429, "response_memory_exceeded")
        expected = "Unread responses to this token use all memory that is available to it; read or close some of them."
        assert error["message"] == expected
        assert int(headers[b"retry-after"]) > 0


def head(size_bytes: int | None) -> Message:
    headers = [] if size_bytes is None else [(b"content-length", b"%d" % size_bytes)]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(data: bytes, **fields: Any) -> Message:
    return {"type": "http.response.body", "body": data, **fields}


async def test_large_body_is_sent_in_chunks_while_its_memory_is_reserved():
    client, data = Client(), bytes(range(256)) * 513
    await client.request(head(len(data)), body(data))
    assert client.received == [
        head(len(data)),
        body(data[:CHUNK_BYTES], more_body=True),
        body(data[CHUNK_BYTES : 2 * CHUNK_BYTES], more_body=True),
        body(data[2 * CHUNK_BYTES :], more_body=False),
    ]
    assert client.reserved_bytes == [len(data), *[len(data) + SOCKET_BYTES] * 3]
    assert client.share.turns == [CHUNK_BYTES, CHUNK_BYTES, 256]
    assert client.memory.reserved_bytes == 0


@pytest.mark.parametrize(("size", "chunks"), [(0, 1), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2)])
@pytest.mark.parametrize("has_more", [False, True])
async def test_only_the_last_chunk_ends_the_response(size: int, chunks: int, has_more: bool):
    client = Client()
    await client.request(head(None), body(b"x" * size, more_body=has_more))
    first, *parts = client.received
    assert first == head(None)
    assert [part["more_body"] for part in parts] == [True] * (chunks - 1) + [has_more]
    assert b"".join(part["body"] for part in parts) == b"x" * size


async def test_message_without_a_body_ends_the_response():
    client = Client()
    await client.request(head(0), {"type": "http.response.body"})
    assert client.received == [head(0), body(b"", more_body=False)]
    assert client.reserved_bytes == [0, SOCKET_BYTES]


async def test_head_of_a_known_length_waits_for_its_body():
    client = Client()
    await client.request(head(5))
    assert client.received == []
    await client.request(head(None))
    assert client.received == [head(None)]


async def test_head_is_sent_once():
    client = Client()
    await client.request(head(2), body(b"a", more_body=True), body(b"b"))
    assert [message["type"].rpartition(".")[2] for message in client.received] == ["start", "body", "body"]
    assert client.reserved_bytes == [1, 1 + SOCKET_BYTES, 1 + SOCKET_BYTES]
    assert client.memory.reserved_bytes == 0


async def test_response_that_exceeds_the_memory_is_refused():
    client = Client(used_bytes=1000)
    await client.request(head(LIMIT_BYTES), body(b"x" * LIMIT_BYTES))
    client.check_was_refused()
    assert len(client.app_errors) == 1, "the app stops"
    assert client.memory.reserved_bytes == 1000


@pytest.mark.parametrize(("excess", "is_refused"), [(0, False), (1, True)])
async def test_response_may_use_the_memory_that_is_left(excess: int, is_refused: bool):
    client, size = Client(used_bytes=50_000), LIMIT_BYTES - 50_000 + excess
    await client.request(head(size), body(b"x" * size))
    assert (client.received[0]["status"] == 429) is is_refused


@pytest.mark.parametrize(("size", "is_refused"), [(SMALL_BYTES, False), (SMALL_BYTES + 1, True)])
async def test_small_response_is_never_refused(size: int, is_refused: bool):
    client = Client(used_bytes=LIMIT_BYTES)
    await client.request(head(size), body(b"x" * size))
    assert (client.received[0]["status"] == 429) is is_refused
    assert client.memory.reserved_bytes == LIMIT_BYTES


async def test_started_stream_is_never_refused():
    client = Client(used_bytes=LIMIT_BYTES)
    await client.request(head(None), body(b"x" * 5000, more_body=True))
    assert client.received == [head(None), body(b"x" * 5000, more_body=True)]
    assert client.reserved_bytes == [LIMIT_BYTES, LIMIT_BYTES + 5000 + SOCKET_BYTES]


@pytest.mark.parametrize(("used_bytes", "is_refused"), [(LIMIT_BYTES, False), (LIMIT_BYTES + 1, True)])
async def test_request_is_refused_before_it_is_handled_if_the_memory_is_exceeded(used_bytes: int, is_refused: bool):
    client = Client(used_bytes)
    await client.request({"type": "websocket.accept"})
    if is_refused:
        client.check_was_refused()
    else:
        assert client.received == [{"type": "websocket.accept"}]
    assert client.memory.reserved_bytes == used_bytes


@pytest.mark.parametrize("text", ["", "x" * 100, "\N{PILE OF POO}" * 100])
async def test_websocket_text_reserves_its_size_in_memory(text: str):
    client, message = Client(), {"type": "websocket.send", "text": text, "bytes": b"ignored"}
    await client.request(message)
    assert client.received == [message]
    assert client.reserved_bytes == [sys.getsizeof(text) + SOCKET_BYTES]
    assert client.share.turns == [sys.getsizeof(text)]


@pytest.mark.parametrize("fields", [{"bytes": b"x" * 70_000}, {"bytes": b"x" * 70_000, "text": None}])
async def test_websocket_bytes_are_sent_in_one_message(fields: dict[str, Any]):
    client, message = Client(), {"type": "websocket.send", **fields}
    await client.request(message)
    assert client.received == [message]
    assert client.reserved_bytes == [70_000 + SOCKET_BYTES]
    assert client.share.turns == [70_000]


async def test_other_messages_reserve_nothing():
    client, messages = Client(), [{"type": "websocket.accept"}, {"type": "websocket.close", "code": 1000}]
    await client.request(*messages)
    assert client.received == messages
    assert (client.reserved_bytes, client.share.turns) == ([0, 0], [])


async def test_connection_can_be_aborted_while_it_has_unread_data():
    aborted: list[str] = []
    client = Client(abort=lambda: aborted.append("aborted"))
    await client.request(head(3), body(b"abc"))
    assert client.closing[0] == []
    [[close]] = client.closing[1:]
    close()
    assert aborted == ["aborted"]


async def test_request_without_a_connection_has_nothing_to_abort():
    client = Client()
    await client.request(head(3), body(b"abc"))
    [[close]] = client.closing[1:]
    assert close() is None
