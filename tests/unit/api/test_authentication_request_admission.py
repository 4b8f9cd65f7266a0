"""Authentication of requests, and revalidation of open streams."""

import pytest
from starlette.requests import HTTPConnection

from doubles.fake_token_store import FakeTokenStore
from sandbox.api import client_limits
from sandbox.api.authentication import LOCAL_OPERATOR, SESSION_SECONDS, Caller, Denied, RequestAdmission
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import Role

STREAM_PATH, TERMINAL_PATH = "/api/v1/tasks/stream", "/api/v1/tasks/task-001/terminal"


class AdmissionHarness:
    """A `RequestAdmission` with a test clock."""

    def __init__(self, token_store: FakeTokenStore, **settings: object) -> None:
        self.now = 100.0
        self.token_store = token_store
        api_settings = ApiSettings("0.1.0", frozenset({8122}), frozenset({"Builds.Example.ORG"}), agents={}, **settings)
        self.admission = RequestAdmission(token_store, api_settings, lambda: self.now)

    def admit(
        self, path: str = "/api/v1/tasks", method: str = "GET", kind: str = "http", **headers: str
    ) -> Caller | Denied:
        """Authenticate a request with this path and these headers."""
        all_headers = {"host": "localhost:8122", **headers}
        scope = {
            "type": kind,
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in all_headers.items()],
            "client": ("127.0.0.1", 5),
            **({"method": method} if kind == "http" else {"subprotocols": []}),
        }
        return self.admission.admit(HTTPConnection(scope))

    def caller(self, **request: str) -> Caller:
        outcome = self.admit(**request)
        assert isinstance(outcome, Caller), outcome
        return outcome

    def denied(self, **request: str) -> Denied:
        outcome = self.admit(**request)
        assert isinstance(outcome, Denied), outcome
        return outcome

    def session_of(self, principal: str) -> str:
        return f"sandbox_session={self.admission.sessions.open(principal)}"


@pytest.fixture
def harness() -> AdmissionHarness:
    return AdmissionHarness(FakeTokenStore(olga="operator", vera="viewer"))


# Revalidation of streams


@pytest.mark.parametrize("path", [STREAM_PATH, "/api/v1/tasks/task-001/logs"])
def test_stream_is_invalid_after_its_token_is_revoked(harness, path):
    operator, viewer = (harness.caller(path=path, authorization=f"Bearer {name}") for name in ("olga", "vera"))
    assert harness.admission.is_still_valid(operator)
    assert harness.admission.is_still_valid(viewer)
    del harness.token_store.roles["vera"]
    assert not harness.admission.is_still_valid(viewer)
    assert harness.admission.is_still_valid(operator), "another token's stream continues"


def test_stream_is_invalid_after_its_session_ends(harness):
    closed_session, open_session = harness.session_of("vera"), harness.session_of("vera")
    first, second = harness.caller(cookie=closed_session), harness.caller(cookie=open_session)
    assert harness.admission.is_still_valid(first)
    harness.admission.sessions.close(closed_session.partition("=")[2])
    assert not harness.admission.is_still_valid(first)
    assert harness.admission.is_still_valid(second), "another page's session continues"
    harness.now += SESSION_SECONDS
    assert not harness.admission.is_still_valid(second)


def test_stream_of_a_session_is_invalid_after_its_token_is_revoked(harness):
    viewer = harness.caller(cookie=harness.session_of("vera"))
    del harness.token_store.roles["vera"]
    assert not harness.admission.is_still_valid(viewer)


def test_anonymous_stream_is_invalid_after_the_first_token_is_created():
    harness = AdmissionHarness(FakeTokenStore())
    caller = harness.caller(path=STREAM_PATH)
    assert caller == Caller(LOCAL_OPERATOR)
    assert harness.admission.is_still_valid(caller)
    harness.token_store.has_tokens = True
    assert not harness.admission.is_still_valid(caller)


def test_stream_with_an_unknown_token_is_invalid_after_the_first_token_is_created():
    harness = AdmissionHarness(FakeTokenStore())
    caller = harness.caller(authorization="Bearer of another server")
    harness.token_store.has_tokens = True
    assert not harness.admission.is_still_valid(caller)


def test_anonymous_caller_of_the_health_endpoint_remains_valid(harness):
    probe = harness.caller(path="/api/v1/health")
    assert probe.principal is None
    assert not probe.is_operator
    del harness.token_store.roles["vera"]
    assert harness.admission.is_still_valid(probe)


# Authentication


def test_caller_has_principal_and_credentials(harness):
    operator, viewer = (harness.caller(authorization=f"Bearer {name}") for name in ("olga", "vera"))
    assert (operator.principal.id, operator.credentials.kind, operator.credentials.value, operator.is_operator) == (
        "olga",
        "token",
        "olga",
        True,
    )
    assert (viewer.principal.role, viewer.is_operator) == (Role.VIEWER, False)
    session = harness.caller(cookie=harness.session_of("vera"))
    assert (session.principal.id, session.credentials.kind) == ("vera", "session")


def test_wrong_token_on_public_path_is_ignored(harness):
    probe = harness.caller(path="/api/v1/health", authorization="Bearer mallory")
    assert (probe.principal, probe.credentials) == (None, None)


def test_session_secret_and_token_are_not_interchangeable(harness):
    secret = harness.session_of("olga").partition("=")[2]
    assert harness.denied(authorization=f"Bearer {secret}").status == 401
    assert harness.denied(cookie="sandbox_session=olga").status == 401
    assert harness.caller(cookie=f"sandbox_session={secret}").is_operator
    for cookies in (
        f"a=b; sandbox_session={secret}",
        f"sandbox_session={secret};a",
        "a;" * 4000 + f"\tsandbox_session ={secret} ",
    ):
        assert harness.caller(cookie=cookies).is_operator
    for cookies in (f"my_sandbox_session={secret}", f"a={secret}", f"sandbox_session={secret}; sandbox_session=x"):
        assert harness.denied(cookie=cookies).status == 401


def test_local_operator_has_the_operator_role_but_no_id():
    assert (LOCAL_OPERATOR.id, LOCAL_OPERATOR.name, LOCAL_OPERATOR.role) == ("", "local", Role.OPERATOR)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_viewer_may_read(harness, method):
    assert harness.caller(method=method, authorization="Bearer vera").principal.id == "vera"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "get"])
def test_viewer_may_change_only_its_session(harness, method):
    denied = harness.denied(method=method, authorization="Bearer vera")
    assert (denied.status, denied.code, denied.principal.id) == (403, "forbidden", "vera")
    assert harness.caller(method=method, path="/api/v1/session", authorization="Bearer vera")
    assert harness.caller(method=method, authorization="Bearer olga")


def test_viewer_may_stream_but_not_open_terminals(harness):
    assert harness.caller(path=STREAM_PATH, kind="websocket", authorization="Bearer vera")
    for path in (TERMINAL_PATH, "/api/v1/session", "/nowhere"):
        assert harness.denied(path=path, kind="websocket", authorization="Bearer vera").status == 403
        assert harness.caller(path=path, kind="websocket", authorization="Bearer olga")


@pytest.mark.parametrize("path", ["/api/v1/health", "/sign-in", "/assets/x.js"])
def test_public_path_allows_only_read_requests_without_a_token(harness, path):
    assert harness.caller(path=path)
    assert harness.denied(path=path, method="POST").status == 401
    assert harness.denied(path=path, kind="websocket").status == 401


def test_missing_and_invalid_credentials_have_different_challenges(harness):
    without_token, wrong = harness.denied(), harness.denied(authorization="Bearer mallory")
    assert [(result.status, result.code, result.principal) for result in (without_token, wrong)] == [
        (401, "unauthorized", None)
    ] * 2
    assert without_token.headers == {"www-authenticate": 'Bearer realm="sandbox"'}
    assert wrong.headers == {"www-authenticate": 'Bearer realm="sandbox", error="invalid_token"'}
    assert without_token.message.startswith("This server requires a token. Send a token as")
    assert wrong.message.startswith("This token or session is unknown, revoked or expired. Send a token as")


# Requests from other sites


EVIL_ORIGIN = {"origin": "https://evil.example"}
EMBEDDED = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}


@pytest.mark.parametrize("headers", [EVIL_ORIGIN, EMBEDDED])
def test_cross_site_request_without_token_is_denied(harness, headers):
    session = {"cookie": harness.session_of("olga")}
    for current in (harness, AdmissionHarness(FakeTokenStore())):
        denied = current.denied(**session, **headers)
        assert (denied.status, denied.code, denied.principal) == (403, "forbidden", None)
    assert harness.caller(authorization="Bearer olga", **headers), "other sites do not have the token"
    assert harness.denied(**headers).status == 401
    assert harness.caller(authorization="Bearer olga", **session, **headers).credentials.kind == "token"


def test_host_header_is_checked_only_without_tokens(harness):
    for host in ("evil.example", "sandbox.example.net"):
        assert harness.caller(host=host, authorization="Bearer olga")
        assert harness.caller(host=host, cookie=harness.session_of("olga"))
        assert AdmissionHarness(FakeTokenStore()).denied(host=host).status == 403
    for host in ("localhost", "127.0.0.1:8122", "builds.example.org", "BUILDS.example.org:8122"):
        assert AdmissionHarness(FakeTokenStore()).caller(host=host)


def test_same_origin_page_may_use_a_session(harness):
    session = harness.session_of("olga")
    assert harness.caller(cookie=session, origin="http://localhost:8122")
    assert harness.denied(cookie=session, origin="http://localhost:3000").status == 403


def test_cross_site_requests_do_not_count_against_the_rate_limit():
    harness = AdmissionHarness(FakeTokenStore(), requests_per_minute=1)
    assert [harness.denied(**EVIL_ORIGIN).status for _ in range(3)] == [403] * 3
    assert harness.caller()
    assert harness.denied().status == 429


# Rate limit


def test_rate_limit_is_per_token_or_per_address():
    harness = AdmissionHarness(FakeTokenStore(olga="operator", vera="viewer"), requests_per_minute=2)
    for name in ("olga", "vera"):
        outcomes = [harness.admit(authorization=f"Bearer {name}") for _ in range(3)]
        assert [type(result) for result in outcomes] == [Caller, Caller, Denied]
        denied = outcomes[-1]
        assert (denied.status, denied.code, denied.principal.id) == (429, "rate_limit_exceeded", name)
        assert denied.headers == {"retry-after": "30"}
        assert denied.message == "Too many requests; try again in 30 s."
    assert [harness.denied().status for _ in range(3)] == [401, 401, 429]
    harness.now += 30
    assert harness.caller(authorization="Bearer olga")


def test_client_over_the_limit_on_concurrent_requests_is_denied(harness, monkeypatch):
    monkeypatch.setattr(client_limits, "CONCURRENT_REQUESTS_MAX", 1)
    authorization = {"authorization": "Bearer olga"}
    with harness.admission.client_limits.track_request(harness.caller(**authorization).principal):
        denied = harness.denied(**authorization)
        assert (denied.status, denied.code, denied.headers) == (429, "rate_limit_exceeded", {"retry-after": "1"})
        assert denied.message == "Too many requests; try again in 1 s."
        assert denied.principal is not None
        assert denied.principal.id == "olga"
        assert harness.caller(authorization="Bearer vera").principal.id == "vera"


def test_required_token_denies_anonymous_callers():
    harness = AdmissionHarness(FakeTokenStore(), requires_token=True)
    assert harness.denied().status == 401
    assert not harness.admission.is_still_valid(Caller(LOCAL_OPERATOR))
