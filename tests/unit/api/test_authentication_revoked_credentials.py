"""Once a token is revoked, its open connections end as if the client had disconnected, and nothing more is sent."""

import json
import logging
from types import SimpleNamespace

import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication
from sandbox.api.authentication import AuthenticationMiddleware, CredentialsRevokedError, RequestAdmission
from sandbox.api.settings import ApiSettings

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"x", "more_body": True}
ACCEPT, TEXT = {"type": "websocket.accept"}, {"type": "websocket.send", "text": "x"}
CLOSE = {"type": "websocket.close", "code": 1008, "reason": "The token is no longer valid."}
INCOMING, DISCONNECT = {"type": "websocket.receive", "text": "hi"}, {"type": "websocket.disconnect", "code": 1008}
CUT_OFF = "A response was cut off: the token or session is no longer valid"


class Connection:
    """A connection of Vera's, on which `app` acts step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.tokens = FakeTokenStore(vera="viewer")
        self.sent: list = []
        settings = ApiSettings("0.1.0", frozenset({8122}), frozenset(), agents={})
        self._admission = RequestAdmission(self.tokens, settings, lambda: self.now)
        monkeypatch.setattr(authentication, "time", SimpleNamespace(monotonic=lambda: self.now))

    def revoke(self, after_seconds: float = 5.0) -> None:
        del self.tokens.roles["vera"]
        self.now += after_seconds

    async def run(self, kind: str, app) -> None:
        scope = {
            "type": kind,
            "path": "/api/v1/tasks/stream",
            "query_string": b"",
            "headers": [(b"host", b"localhost:8122"), (b"authorization", b"Bearer vera")],
            "client": ("127.0.0.1", 5),
            **({"method": "GET"} if kind == "http" else {"subprotocols": []}),
        }
        await AuthenticationMiddleware(app, self._admission)(scope, self._receive, self._send)

    async def _receive(self):
        return INCOMING

    async def _send(self, message) -> None:
        self.sent.append(message)


@pytest.fixture
def connection(monkeypatch, caplog) -> Connection:
    caplog.set_level(logging.INFO, logger="sandbox.api.authentication")
    return Connection(monkeypatch)


async def check_is_cut_off(send, message) -> None:
    with pytest.raises(CredentialsRevokedError):
        await send(message)


def types(messages) -> list[str]:
    return [message["type"] for message in messages]


async def test_revoked_token_gets_an_error_instead_of_a_response(connection):
    async def app(scope, receive, send) -> None:
        connection.revoke()
        await send(START)

    await connection.run("http", app)
    start, body = connection.sent
    assert (start["status"], json.loads(body["body"])["error"]) == (401, "unauthorized")
    assert b'error="invalid_token"' in dict(start["headers"])[b"www-authenticate"]


async def test_started_response_ends_after_revocation(connection, caplog):
    async def app(scope, receive, send) -> None:
        await send(START)
        await send(BODY)
        connection.revoke()
        for _ in range(3):
            await check_is_cut_off(send, BODY)
        await send(BODY)

    await connection.run("http", app)
    assert types(connection.sent) == [START["type"], BODY["type"]]
    assert caplog.messages == [CUT_OFF]


async def test_websocket_is_closed_once_after_revocation(connection, caplog):
    async def app(scope, receive, send) -> None:
        await send(ACCEPT)
        await send(TEXT)
        connection.revoke()
        await check_is_cut_off(send, TEXT)
        await check_is_cut_off(send, {"type": "websocket.close"})
        assert await receive() == DISCONNECT

    await connection.run("websocket", app)
    assert connection.sent == [ACCEPT, TEXT, CLOSE]
    assert caplog.messages == [CUT_OFF]


async def test_message_of_a_revoked_token_is_received_as_a_disconnection(connection):
    async def app(scope, receive, send) -> None:
        assert await receive() == INCOMING
        connection.revoke()
        assert [await receive(), await receive()] == [DISCONNECT, DISCONNECT]
        await check_is_cut_off(send, TEXT)

    await connection.run("websocket", app)
    assert connection.sent == [CLOSE]


async def test_handshake_and_close_are_not_checked(connection):
    async def app(scope, receive, send) -> None:
        connection.revoke()
        await send(ACCEPT)
        await send({"type": "websocket.close"})

    await connection.run("websocket", app)
    assert connection.sent == [ACCEPT, {"type": "websocket.close"}]


async def test_credentials_are_checked_every_five_seconds(connection):
    async def app(scope, receive, send) -> None:
        await send(START)
        connection.revoke(after_seconds=4.75)
        await send(BODY)
        connection.now += 0.25
        await check_is_cut_off(send, BODY)

    await connection.run("http", app)
    assert types(connection.sent) == [START["type"], BODY["type"]]


async def test_next_check_is_five_seconds_after_the_last(connection):
    async def app(scope, receive, send) -> None:
        await send(START)
        connection.now += 5
        await send(BODY)
        connection.revoke(after_seconds=4.75)
        await send(BODY)
        connection.now += 0.25
        await check_is_cut_off(send, BODY)

    await connection.run("http", app)
    assert types(connection.sent) == [START["type"], BODY["type"], BODY["type"]]
