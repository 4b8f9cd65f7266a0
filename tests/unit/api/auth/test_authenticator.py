"""A stream goes on for those who would be let in again at this moment, and for nobody else."""

import pytest
from starlette.requests import HTTPConnection

from doubles.fake_access import FakeAccess
from sandbox.api.auth.authenticator import LOCAL_OPERATOR, Authenticator, Caller, Denied
from sandbox.api.auth.sessions import SESSION_SECONDS
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import Role

STREAM, TERMINAL = "/api/v1/tasks/stream", "/api/v1/tasks/task-001/terminal"


class Server:
    """A guard, whose clock goes as the test says."""

    def __init__(self, access: FakeAccess, **settings: object) -> None:
        self.now = 100.0
        self.access = access
        told = ApiSettings("0.1.0", frozenset({8122}), frozenset({"Builds.Example.ORG"}), **settings)
        self.guard = Authenticator(access, told, lambda: self.now)

    def admit(
        self, path: str = "/api/v1/tasks", method: str = "GET", kind: str = "http", **headers: str
    ) -> Caller | Denied:
        """Who comes from this address with these headers."""
        lines = {"host": "localhost:8122", **headers}
        scope = {
            "type": kind,
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in lines.items()],
            "client": ("127.0.0.1", 5),
            **({"method": method} if kind == "http" else {"subprotocols": []}),
        }
        return self.guard.authenticate(HTTPConnection(scope))

    def visitor(self, **how: str) -> Caller:
        found = self.admit(**how)
        assert isinstance(found, Caller), found
        return found

    def refusal(self, **how: str) -> Denied:
        found = self.admit(**how)
        assert isinstance(found, Denied), found
        return found

    def session_of(self, principal: str) -> str:
        return f"sandbox_session={self.guard.sessions.open(principal)}"


@pytest.fixture
def server() -> Server:
    return Server(FakeAccess(olga="operator", vera="viewer"))


# Who may stay


@pytest.mark.parametrize("path", [STREAM, "/api/v1/tasks/task-001/logs"])
def test_a_stream_outlives_no_token(server, path):
    olga, vera = (server.visitor(path=path, authorization=f"Bearer {name}") for name in ("olga", "vera"))
    assert server.guard.is_still_valid(olga)
    assert server.guard.is_still_valid(vera)
    del server.access.roles["vera"]
    assert not server.guard.is_still_valid(vera)
    assert server.guard.is_still_valid(olga), "another token's stream goes on"


def test_a_stream_outlives_no_session(server):
    ended, kept = server.session_of("vera"), server.session_of("vera")
    one, other = server.visitor(cookie=ended), server.visitor(cookie=kept)
    assert server.guard.is_still_valid(one)
    server.guard.sessions.close(ended.partition("=")[2])
    assert not server.guard.is_still_valid(one)
    assert server.guard.is_still_valid(other), "the session of another page goes on"
    server.now += SESSION_SECONDS
    assert not server.guard.is_still_valid(other)


def test_a_stream_of_a_session_outlives_no_token(server):
    vera = server.visitor(cookie=server.session_of("vera"))
    del server.access.roles["vera"]
    assert not server.guard.is_still_valid(vera)


def test_a_stream_that_was_opened_without_a_token_ends_when_there_are_tokens():
    server = Server(FakeAccess())
    anybody = server.visitor(path=STREAM)
    assert anybody == Caller(LOCAL_OPERATOR)
    assert server.guard.is_still_valid(anybody)
    server.access.has_tokens = True
    assert not server.guard.is_still_valid(anybody)


def test_a_wrong_token_of_a_server_without_tokens_is_no_right_either():
    server = Server(FakeAccess())
    anybody = server.visitor(authorization="Bearer of another server")
    server.access.has_tokens = True
    assert not server.guard.is_still_valid(anybody)


def test_who_needed_no_name_may_stay(server):
    probe = server.visitor(path="/api/v1/health")
    assert probe.principal is None
    assert not probe.is_operator
    del server.access.roles["vera"]
    assert server.guard.is_still_valid(probe)


# Who is let in


def test_a_visitor_is_who_showed_the_proof_and_that_proof(server):
    olga, vera = (server.visitor(authorization=f"Bearer {name}") for name in ("olga", "vera"))
    assert (olga.principal.id, olga.credentials.kind, olga.credentials.value, olga.is_operator) == (
        "olga",
        "token",
        "olga",
        True,
    )
    assert (vera.principal.role, vera.is_operator) == (Role.VIEWER, False)
    session = server.visitor(cookie=server.session_of("vera"))
    assert (session.principal.id, session.credentials.kind) == ("vera", "session")


def test_a_wrong_proof_at_an_open_address_is_no_proof(server):
    probe = server.visitor(path="/api/v1/health", authorization="Bearer mallory")
    assert (probe.principal, probe.credentials) == (None, None)


def test_a_secret_of_a_session_is_no_token_and_a_token_no_session(server):
    secret = server.session_of("olga").partition("=")[2]
    assert server.refusal(authorization=f"Bearer {secret}").status == 401
    assert server.refusal(cookie="sandbox_session=olga").status == 401
    assert server.visitor(cookie=f"sandbox_session={secret}").is_operator


def test_the_local_operator_has_no_id_and_is_an_operator():
    assert (LOCAL_OPERATOR.id, LOCAL_OPERATOR.name, LOCAL_OPERATOR.role) == ("", "local", Role.OPERATOR)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_viewer_looks_on(server, method):
    assert server.visitor(method=method, authorization="Bearer vera").principal.id == "vera"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "get"])
def test_a_viewer_changes_nothing_but_the_own_session(server, method):
    refused = server.refusal(method=method, authorization="Bearer vera")
    assert (refused.status, refused.code, refused.principal.id) == (403, "forbidden", "vera")
    assert server.visitor(method=method, path="/api/v1/session", authorization="Bearer vera")
    assert server.visitor(method=method, authorization="Bearer olga")


def test_a_viewer_follows_by_websocket_and_gets_no_terminal(server):
    assert server.visitor(path=STREAM, kind="websocket", authorization="Bearer vera")
    for path in (TERMINAL, "/api/v1/session", "/nowhere"):
        assert server.refusal(path=path, kind="websocket", authorization="Bearer vera").status == 403
        assert server.visitor(path=path, kind="websocket", authorization="Bearer olga")


@pytest.mark.parametrize("path", ["/api/v1/health", "/sign-in", "/assets/x.js"])
def test_an_open_address_is_open_to_reading_only(server, path):
    assert server.visitor(path=path)
    assert server.refusal(path=path, method="POST").status == 401
    assert server.refusal(path=path, kind="websocket").status == 401


def test_who_shows_nothing_is_told_so_and_who_shows_something_wrong_that(server):
    nothing, wrong = server.refusal(), server.refusal(authorization="Bearer mallory")
    assert [(one.status, one.code, one.principal) for one in (nothing, wrong)] == [(401, "unauthorized", None)] * 2
    assert nothing.headers == {"www-authenticate": 'Bearer realm="sandbox"'}
    assert wrong.headers == {"www-authenticate": 'Bearer realm="sandbox", error="invalid_token"'}
    assert nothing.message.startswith("This server requires a token. Send a token as")
    assert wrong.message.startswith("This token or session is unknown, revoked or expired. Send a token as")


# Pages of other sites


EVIL = {"origin": "https://evil.example"}
EMBEDDED = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}


@pytest.mark.parametrize("headers", [EVIL, EMBEDDED])
def test_a_page_of_another_site_is_refused_where_it_could_use_what_a_browser_has(server, headers):
    session = {"cookie": server.session_of("olga")}
    for place in (server, Server(FakeAccess())):
        refused = place.refusal(**session, **headers)
        assert (refused.status, refused.code, refused.principal) == (403, "forbidden", None)
    assert server.visitor(authorization="Bearer olga", **headers), "no page has the token"
    assert server.refusal(**headers).status == 401
    assert server.visitor(authorization="Bearer olga", **session, **headers).credentials.kind == "token"


def test_any_host_may_be_named_where_there_are_tokens_and_only_the_own_where_there_are_none(server):
    for host in ("evil.example", "sandbox.example.net"):
        assert server.visitor(host=host, authorization="Bearer olga")
        assert server.visitor(host=host, cookie=server.session_of("olga"))
        assert Server(FakeAccess()).refusal(host=host).status == 403
    for host in ("localhost", "127.0.0.1:8122", "builds.example.org", "BUILDS.example.org:8122"):
        assert Server(FakeAccess()).visitor(host=host)


def test_an_own_page_may_use_a_session(server):
    session = server.session_of("olga")
    assert server.visitor(cookie=session, origin="http://localhost:8122")
    assert server.refusal(cookie=session, origin="http://localhost:3000").status == 403


def test_pages_of_other_sites_are_not_counted():
    server = Server(FakeAccess(), requests_per_minute=1)
    assert [server.refusal(**EVIL).status for _ in range(3)] == [403] * 3
    assert server.visitor()
    assert server.refusal().status == 429


# How much may be asked


def test_each_token_has_its_own_count_and_who_has_none_that_of_the_address():
    server = Server(FakeAccess(olga="operator", vera="viewer"), requests_per_minute=2)
    for name in ("olga", "vera"):
        answers = [server.admit(authorization=f"Bearer {name}") for _ in range(3)]
        assert [type(one) for one in answers] == [Caller, Caller, Denied]
        refused = answers[-1]
        assert (refused.status, refused.code, refused.principal.id) == (429, "rate_limit_exceeded", name)
        assert refused.headers == {"retry-after": "30"}
        assert refused.message == "Too many requests; try again in 30 s."
    assert [server.refusal().status for _ in range(3)] == [401, 401, 429]
    server.now += 30
    assert server.visitor(authorization="Bearer olga")


# Where repositories may come from


def test_hosts_of_repositories_are_named_as_soon_as_tokens_are_asked_for():
    hosts = frozenset({"github.com"})
    assert Server(FakeAccess(olga="operator"), clone_hosts=hosts).guard.clone_hosts() == hosts
    assert Server(FakeAccess(), clone_hosts=hosts, requires_token=True).guard.clone_hosts() == hosts
    assert Server(FakeAccess(), clone_hosts=hosts).guard.clone_hosts() is None


def test_a_server_that_needs_a_token_lets_nobody_in_without_one():
    server = Server(FakeAccess(), requires_token=True)
    assert server.refusal().status == 401
    assert not server.guard.is_still_valid(Caller(LOCAL_OPERATOR))
