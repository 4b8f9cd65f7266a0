"""Requests are passed on with their caller, and open responses end once their credentials are revoked."""

import asyncio
from types import SimpleNamespace

import pytest
from starlette.requests import HTTPConnection

from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication
from sandbox.api.authentication import (
    AuthenticationMiddleware,
    CredentialsRevokedError,
    RequestAdmission,
    get_caller,
    require_valid_credentials,
)
from sandbox.api.settings import ApiSettings
from sandbox.primitives import fair_client_shares
from sandbox.primitives.log_context import TOKEN_ID

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"", "more_body": False}
STREAM_PATH = "/api/v1/tasks/stream"
ACCEPT, EVENT = {"type": "websocket.accept"}, {"type": "websocket.send", "text": "event"}


class Connection:
    """A client's connection, and the app behind the middleware."""

    def __init__(self, monkeypatch):
        self.token_store = FakeTokenStore(olga="operator", vera="viewer")
        settings = ApiSettings("0.1.0", frozenset({8122}), frozenset(), agents={})
        self.admission = RequestAdmission(self.token_store, settings, lambda: 100.0)
        self.now = 1000.0
        self.messages = []
        self.received = asyncio.Queue()
        monkeypatch.setattr(authentication, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def request(self, app, path="/api/v1/tasks", method="GET", kind="http", token="vera", query="", **headers):
        """Send a request and wait for the end of the app."""
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        scope = {
            "type": kind,
            "path": path,
            "query_string": query.encode(),
            "headers": [
                (name.encode(), value.encode()) for name, value in {"host": "localhost:8122", **headers}.items()
            ],
            "client": ("127.0.0.1", 5),
            "server": ("localhost", 8122),
            "scheme": "http" if kind == "http" else "ws",
            **({"method": method} if kind == "http" else {"subprotocols": []}),
        }
        await AuthenticationMiddleware(app, self.admission)(scope, self.received.get, self.send)

    async def send(self, message):
        self.messages.append(message)

    def revoke(self, name="vera"):
        del self.token_store.roles[name]

    @property
    def status(self):
        return self.messages[0]["status"]

    def header(self, name):
        return dict(self.messages[0]["headers"]).get(name.encode(), b"").decode()


@pytest.fixture
def connection(monkeypatch):
    return Connection(monkeypatch)


async def test_request_is_passed_on_with_its_caller_and_share(connection):
    found = {}

    async def app(scope, _receive, send):
        found.update(
            caller=get_caller(HTTPConnection(scope)),
            token_id=TOKEN_ID.get(),
            shares={id(scope["state"]["share"]), id(fair_client_shares._SHARE.get())},
        )
        await send(START)
        await send(END)

    await connection.request(app)
    assert found["caller"].principal.id == found["token_id"] == "vera"
    assert found["shares"] == {id(connection.admission.client_limits.fair_share_of(found["caller"].principal))}
    assert connection.messages == [START, END]


async def test_denied_request_does_not_reach_the_app(connection):
    async def app(*_):
        pytest.fail("The app must not get the request.")

    await connection.request(app, token="mallory")
    assert connection.status == 401
    assert connection.header("www-authenticate").endswith('error="invalid_token"')


async def test_token_of_the_previous_request_is_not_logged_for_a_denied_one(connection):
    TOKEN_ID.set("vera")
    await connection.request(None, token=None)
    assert TOKEN_ID.get() is None


@pytest.mark.parametrize(
    ("request_options", "target"),
    [
        ({"path": "/tasks/fix", "query": ""}, "/login?to=%2Ftasks%2Ffix"),
        ({"path": "/tasks", "query": "q=a"}, "/login?to=%2Ftasks%3Fq%3Da"),
        ({"path": "/api/v1/tasks"}, None),
        ({"path": "/tasks", "method": "POST"}, None),
        ({"path": "/tasks", "accept": "application/json"}, None),
    ],
)
async def test_page_without_credentials_redirects_to_the_sign_in_page(connection, request_options, target):
    await connection.request(None, token=None, **{"accept": "text/html", **request_options})
    if target is None:
        assert (connection.status, connection.header("location")) == (401, "")
    else:
        assert (connection.status, connection.header("location")) == (303, authentication.paths.SIGN_IN + target[6:])
        assert connection.header("vary") == "accept"


@pytest.mark.parametrize(("seconds", "is_cut_off"), [(4.9, False), (5.0, True)])
async def test_stream_is_cut_off_at_most_five_seconds_after_its_token_is_revoked(connection, seconds, is_cut_off):
    async def app(_scope, _receive, send):
        await send(START)
        connection.revoke()
        connection.now += seconds
        await send({**END, "more_body": True})
        await send(END)

    await connection.request(app)
    assert len(connection.messages) == (1 if is_cut_off else 3)


async def test_valid_stream_is_checked_every_five_seconds(connection, monkeypatch):
    checks = []
    is_still_valid = connection.admission.is_still_valid
    monkeypatch.setattr(
        connection.admission, "is_still_valid", lambda caller: checks.append(connection.now) or is_still_valid(caller)
    )

    async def app(_scope, _receive, send):
        await send(START)
        for _ in range(20):
            connection.now += 1
            await send({**END, "more_body": True})
        await send(END)

    await connection.request(app)
    assert checks == [1005, 1010, 1015, 1020]
    assert len(connection.messages) == 22


async def test_app_gets_the_same_error_for_each_message_after_the_credentials_were_revoked(connection, caplog):
    caplog.set_level("INFO", "sandbox.api.authentication")
    errors = []

    async def app(_scope, _receive, send):
        connection.revoke()
        connection.now += 5
        for message in (START, END, {"type": "http.response.trailers"}):
            try:
                await send(message)
            except CredentialsRevokedError as error:
                errors.append(error)

    await connection.request(app)
    assert len(errors) == 3
    assert caplog.messages == ["A response was cut off: the token or session is no longer valid"]
    assert connection.messages == []


async def test_response_that_has_not_started_becomes_an_error_after_the_credentials_were_revoked(connection):
    async def app(scope, *_):
        connection.revoke()
        require_valid_credentials(HTTPConnection(scope), connection.admission)

    await connection.request(app, method="POST", token="vera", path="/api/v1/session")
    assert connection.status == 401
    assert connection.header("www-authenticate").endswith('error="invalid_token"')


async def test_change_with_valid_credentials_is_allowed(connection):
    async def app(scope, _receive, send):
        require_valid_credentials(HTTPConnection(scope), connection.admission)
        await send(START)

    await connection.request(app, token="olga", method="POST")
    assert connection.messages == [START]


async def test_websocket_is_closed_once_with_a_reason_after_its_token_is_revoked(connection):
    received = []

    async def app(_scope, receive, send):
        await send(ACCEPT)
        received.append(await receive())
        connection.revoke()
        connection.now += 5
        received.append(await receive())
        for _ in range(2):
            with pytest.raises(CredentialsRevokedError):
                await send(EVENT)
        received.append(await receive())

    text = {"type": "websocket.receive", "text": "x"}
    for message in (text, text, {"type": "websocket.disconnect", "code": 1000}):
        connection.received.put_nowait(message)
    await connection.request(app, STREAM_PATH, kind="websocket")
    assert received == [
        text,
        {"type": "websocket.disconnect", "code": 1008},
        {"type": "websocket.disconnect", "code": 1000},
    ]
    assert connection.messages == [
        ACCEPT,
        {"type": "websocket.close", "code": 1008, "reason": "The token is no longer valid."},
    ]


async def test_revoked_websocket_gets_no_error_response(connection):
    async def app(_scope, _receive, send):
        connection.revoke()
        connection.now += 5
        await send(EVENT)

    await connection.request(app, STREAM_PATH, kind="websocket")
    assert [message["type"] for message in connection.messages] == ["websocket.close"]


@pytest.mark.parametrize(
    ("offered", "accepted"),
    [
        (["sandbox.v1", "sandbox.bearer.vera"], {"type": "websocket.accept", "subprotocol": "sandbox.v1"}),
        (["sandbox.bearer.vera"], ACCEPT),
    ],
)
async def test_token_among_the_subprotocols_is_neither_passed_on_nor_accepted(connection, offered, accepted):
    found = []

    async def app(scope, _receive, send):
        found.extend(scope["subprotocols"])
        await send(ACCEPT)
        await send(EVENT)

    scope = {
        "type": "websocket",
        "path": STREAM_PATH,
        "headers": [(b"host", b"localhost:8122")],
        "client": ("127.0.0.1", 5),
        "subprotocols": offered,
    }
    await AuthenticationMiddleware(app, connection.admission)(scope, connection.received.get, connection.send)
    assert found == [name for name in offered if name == "sandbox.v1"]
    assert connection.messages == [accepted, EVENT]


async def test_messages_of_the_server_itself_are_not_authenticated(connection):
    found = []

    async def app(scope, *_):
        found.append(scope["type"])

    await AuthenticationMiddleware(app, connection.admission)({"type": "lifespan"}, None, None)
    assert found == ["lifespan"]


async def test_request_is_charged_to_the_share_of_its_client_even_if_it_is_denied(connection):
    share = connection.admission.client_limits.fair_share_of(None)
    before = share._messages_left
    await connection.request(None, token=None)
    assert before - share._messages_left == 5  # 16 KiB
