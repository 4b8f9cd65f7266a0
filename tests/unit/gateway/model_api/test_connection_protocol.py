"""The model protocol of the gateway, tested without I/O: bytes in, bytes out, and reported events."""

import gzip
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.model_api.request_gate import ModelPolicy, ModelRequestGate
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.gateway.sans_io import Effects, Phase
from sandbox.interfaces.gateway import Budget, GatewayRules, KeyRejected, ModelUpstream
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

DIALECT = MessagesApi()
GATEWAY_KEY, SERVER_KEY = "task-key-of-this-task", "sk-the-servers-own"
BODY = b'{"model":"m","stream":true}'
SSE_BODY = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-haiku-4-5","usage":'
    b'{"input_tokens":10,"output_tokens":1}}}\n\nevent: message_delta\ndata: '
    b'{"type":"message_delta","usage":{"output_tokens":5}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
STREAM_USAGE = Usage("claude-haiku-4-5", 10, 5, 0, 0, (10 + 25) / 1e6)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = STREAM_HEAD + chunk(SSE_BODY) + b"0\r\n\r\n"


def request(
    target: str = "/v1/messages?beta=true",
    *headers: str,
    method: str = "POST",
    credential_header: str | None = f"x-api-key: {GATEWAY_KEY}",
    host: str = "127.0.0.1:8123",
    body: bytes = BODY,
    version: str = "1.1",
) -> bytes:
    lines = [
        f"{method} {target} HTTP/{version}",
        f"Host: {host}",
        *([credential_header] if credential_header else []),
        *headers,
    ]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class RecordedEvents(list):
    @property
    def denials(self) -> list[EgressDenied]:
        return [event for event in self if isinstance(event, EgressDenied)]

    @property
    def usages(self) -> list[Usage]:
        return [event for event in self if isinstance(event, Usage)]

    @property
    def errors(self) -> list[ErrorReported]:
        return [event for event in self if isinstance(event, ErrorReported)]


def create_protocol(
    base_url: str = "https://up.example/base",
    *,
    uses_auth_token: bool = False,
    key: str = SERVER_KEY,
    is_unrestricted: bool = False,
    budget: Budget = Budget(),
) -> tuple[ModelProtocol, RecordedEvents]:
    """Create a protocol. With `is_unrestricted`, the protocol forwards request bodies without reading them."""
    events = RecordedEvents()
    upstream = ModelUpstream(base_url, auth_token=key) if uses_auth_token else ModelUpstream(base_url, api_key=key)
    policy, reporter = ModelPolicy(DIALECT, GATEWAY_KEY, 8123), EventReporter(events.append, lambda: 0.0)
    rules = GatewayRules(egress=EgressRules(is_unrestricted=is_unrestricted), budget=budget)
    gate = ModelRequestGate(rules, reporter, DIALECT)
    return ModelProtocol(DIALECT, policy, gate, parse_upstream(upstream, DIALECT), reporter, 8123), events


def head_of(data: bytes | bytearray) -> tuple[str, dict[str, str]]:
    first, *lines = bytes(data).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return first, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def error_of(effects: Effects) -> tuple[int, str, str]:
    """Return the status, type and message of an error response from the Messages API."""
    head, _, body = bytes(effects.to_client).partition(b"\r\n\r\n")
    error = json.loads(body)
    assert set(error) == {"type", "error"}
    assert error["type"] == "error"
    return int(head.split(b" ")[1]), error["error"]["type"], error["error"]["message"]


# Accepted requests


@pytest.mark.parametrize("is_unrestricted", [True, False])
def test_request_and_its_body_are_forwarded_with_the_server_key(is_unrestricted):
    protocol, events = create_protocol(is_unrestricted=is_unrestricted)
    data = request("/v1/messages?beta=true", "anthropic-beta: a,b", "X-App: cli", "Content-Type: application/json")
    effects = protocol.client_data_received(data)
    assert effects.dial
    assert not effects.to_client
    first, headers = head_of(effects.to_upstream)
    assert first == "POST /base/v1/messages?beta=true HTTP/1.1"
    assert headers == {
        "host": "up.example",
        "x-api-key": SERVER_KEY,
        "accept-encoding": "identity",
        "anthropic-beta": "a,b",
        "x-app": "cli",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
    }
    assert effects.to_upstream.endswith(b"\r\n\r\n" + BODY)
    assert protocol.is_in_flight
    assert events == []


@pytest.mark.parametrize("credential_header", [f"x-api-key: {GATEWAY_KEY}", f"Authorization: Bearer {GATEWAY_KEY}"])
@pytest.mark.parametrize("uses_auth_token", [True, False])
def test_both_credential_headers_are_accepted_and_replaced(credential_header, uses_auth_token):
    protocol, _ = create_protocol(uses_auth_token=uses_auth_token)
    _, headers = head_of(protocol.client_data_received(request(credential_header=credential_header)).to_upstream)
    expected = {"authorization": f"Bearer {SERVER_KEY}"} if uses_auth_token else {"x-api-key": SERVER_KEY}
    assert {name: value for name, value in headers.items() if name in ("authorization", "x-api-key")} == expected


CLAUDE_CODE_HEADERS = {
    "accept": "application/json",
    "accept-language": "*",
    "user-agent": "claude-cli/2.1.332 (external, sdk-cli)",
    "x-claude-code-session-id": "00000000-0000-4000-8000-0000000000aa",
    "x-claude-code-agent-id": "a8551931e4d954440",
    "x-stainless-arch": "x64",
    "x-stainless-retry-count": "0",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "x-app": "cli",
    "x-client-request-id": "r",
}
UNKNOWN_HEADERS = {
    "X-HTTP-Method-Override": "DELETE",
    "X-HTTP-Method": "GET",
    "X-Method-Override": "GET",
    "_method": "GET",
    "X-Original-URL": "/v1/files",
    "X-Rewrite-URL": "/v1/files",
    "X-Forwarded-Host": "evil.example",
    "X-Host": "evil.example",
    "Forwarded": "host=evil.example",
    "anthropic-workspace-id": "another",
    "anthropic-organization-id": "another",
    "anthropic-user-profile-id": "another",
    "anthropic_beta": "x",
    "X_Stainless_Arch": "x",
    "X-Anthropic-Beta": "x",
    "x-amz-target": "x",
    "x-goog-user-project": "x",
    "x-litellm-api-key": "x",
    "X-Real-IP": "127.0.0.1",
    "Cookie": "a=b",
    "Range": "bytes=0-",
    "If-None-Match": "x",
    "Origin": "https://evil.example",
    "Referer": "https://evil.example",
    "Sec-WebSocket-Key": "x",
    "Content-Location": "x",
    "Content-Type-Override": "x",
}


@pytest.mark.parametrize("is_unrestricted", [True, False])
def test_only_known_claude_code_headers_are_forwarded(is_unrestricted):
    protocol, events = create_protocol(is_unrestricted=is_unrestricted)
    lines = [f"{name}: {value}" for name, value in (CLAUDE_CODE_HEADERS | UNKNOWN_HEADERS).items()]
    ordinary = ("Connection: keep-alive", "Accept-Encoding: gzip", "Content-Type: application/json", "Expect: x")
    sent = protocol.client_data_received(request("/v1/messages", *lines, *ordinary))
    _, headers = head_of(sent.to_upstream)
    set_by_gateway = {"host", "x-api-key", "accept-encoding", "content-type", "content-length"}
    assert {name: value for name, value in headers.items() if name not in set_by_gateway} == CLAUDE_CODE_HEADERS
    assert [event.error for event in events.errors] == ["model_headers_dropped"]
    assert "x-http-method-override, x-http-method," in events.errors[0].message
    assert "accept-encoding" not in events.errors[0].message


def test_connection_headers_of_claude_code_are_dropped_without_a_report():
    protocol, events = create_protocol()
    lines = [f"{name}: {value}" for name, value in CLAUDE_CODE_HEADERS.items()]
    ordinary = ("connection: keep-alive", "accept-encoding: gzip, deflate, br, zstd", "content-type: application/json")
    protocol.client_data_received(request("/v1/messages", *lines, *ordinary))
    assert events == []


def test_only_the_first_of_duplicate_headers_is_forwarded_except_for_lists():
    protocol, events = create_protocol()
    duplicates = ("Anthropic-Version: 1", "anthropic-version: 2", "anthropic-beta: a", "Anthropic-Beta: b")
    sent = bytes(protocol.client_data_received(request("/v1/messages", *duplicates)).to_upstream)
    assert b"Anthropic-Version: 1\r\n" in sent
    assert b"anthropic-version: 2" not in sent
    assert b"anthropic-beta: a\r\n" in sent
    assert b"Anthropic-Beta: b\r\n" in sent
    assert len(events.errors) == 1


def test_headers_listed_in_connection_are_not_forwarded():
    protocol, _ = create_protocol()
    sent = protocol.client_data_received(request("/v1/messages", "Connection: close, X-App", "X-App: cli"))
    assert "x-app" not in head_of(sent.to_upstream)[1]


def test_folded_header_is_joined_to_one_line():
    protocol, _ = create_protocol()
    sent = protocol.client_data_received(request("/v1/messages", "X-App: cli\r\n X-HTTP-Method-Override: GET"))
    assert head_of(sent.to_upstream)[1]["x-app"] == "cli X-HTTP-Method-Override: GET"
    assert b"\r\n X-" not in sent.to_upstream


@pytest.mark.parametrize(
    "target",
    [
        "/v1/messages?_method=DELETE",
        "/v1/messages?beta=true&_method=GET",
        "/v1/messages?beta=true&beta=true",
        "/v1/messages?beta=true#x",
        "/v1/messages?beta=%74rue",
        "/v1/messages;x=1",
        "/v1/messages/",
        "//v1/messages",
        "/v1//messages",
        "/v1/./messages",
        "/v1/messages/../files",
        "/v1/messages%2f..%2ffiles",
        "/v1/mess%61ges",
        "/V1/messages",
        "/v1/messages/batches",
        "/v1/messages\\count_tokens",
        "http://127.0.0.1:8123/v1/messages",
        "*",
    ],
)
def test_noncanonical_path_or_query_is_rejected(target):
    protocol, _ = create_protocol()
    assert error_of(protocol.client_data_received(request(target)))[0] == 403


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
def test_inspected_body_is_sent_without_content_encoding(encoding):
    protocol, events = create_protocol()
    sent = protocol.client_data_received(request("/v1/messages", f"Content-Encoding: {encoding}"))
    assert "content-encoding" not in head_of(sent.to_upstream)[1]
    compressed = gzip.compress(BODY)
    assert (
        error_of(
            create_protocol()[0].client_data_received(
                request("/v1/messages", "Content-Encoding: gzip", body=compressed)
            )
        )[0]
        == 400
    )
    assert events == []


def test_private_and_hop_by_hop_headers_are_not_forwarded():
    protocol, _ = create_protocol()
    private = ("Cookie: a=b", "Proxy-Authorization: x", "X-Forwarded-For: 1.2.3.4", "Forwarded: for=x", "Via: 1.1 x")
    # Some servers treat these names like the hyphenated names.
    private += ("X_Api_Key: another-account", "Transfer_Encoding: chunked", "Content_Length: 5")
    hops = ("Connection: keep-alive, X-Hop", "X-Hop: 1", "Keep-Alive: 5", "TE: trailers", "Accept-Encoding: gzip, br")
    sent = protocol.client_data_received(request("/v1/messages", *private, *hops))
    expected = {"host", "x-api-key", "accept-encoding", "content-type", "content-length"}
    assert set(head_of(sent.to_upstream)[1]) == expected
    assert GATEWAY_KEY.encode() not in sent.to_upstream


def test_chunked_body_remains_chunked_without_trailers():
    protocol, _ = create_protocol(is_unrestricted=True)
    sent = protocol.client_data_received(
        request(
            "/v1/messages", "Transfer-Encoding: chunked", body=chunk(b"abc") + chunk(b"de") + b"0\r\nX-T: 1\r\n\r\n"
        )
    )
    assert head_of(sent.to_upstream)[1]["transfer-encoding"] == "chunked"
    assert sent.to_upstream.endswith(b"\r\n\r\n" + chunk(b"abc") + chunk(b"de") + b"0\r\n\r\n")


def test_request_with_expect_continue_receives_a_100_response():
    protocol, _ = create_protocol(is_unrestricted=True)
    effects = protocol.client_data_received(
        request("/v1/messages", "Expect: 100-continue", "Content-Length: 5", body=b"")
    )
    assert effects.to_client.startswith(b"HTTP/1.1 100 ")
    assert "expect" not in head_of(effects.to_upstream)[1]
    assert protocol.client_data_received(b"hello").to_upstream == b"hello"


# Rejected requests


@pytest.mark.parametrize(
    "credential_header",
    [
        None,
        "x-api-key: another",
        f"x-api-key: {GATEWAY_KEY}x",
        "x-api-key: ",
        f"x-api-key: {SERVER_KEY}",
        f"Authorization: Basic {GATEWAY_KEY}",
        f"Authorization: {GATEWAY_KEY}",
        f"x-api-key: {GATEWAY_KEY}\r\nx-api-key: {GATEWAY_KEY}",
        f"x-api-key: {GATEWAY_KEY}\r\nAuthorization: Bearer sk-mine",
        "x-api-key: \u00e9",
    ],
)
def test_wrong_or_missing_or_duplicate_key_causes_an_authentication_error(credential_header):
    protocol, events = create_protocol()
    effects = protocol.client_data_received(request(credential_header=credential_header))
    status, kind, message = error_of(effects)
    assert (status, kind) == (401, "authentication_error")
    assert (effects.dial, effects.to_upstream) == (False, b"")
    assert events == [EgressDenied("model", 8123, message)]
    assert not protocol.is_in_flight


def test_connection_accepts_the_right_key_after_a_rejection():
    protocol, events = create_protocol()
    assert not protocol.client_data_received(request(credential_header="x-api-key: wrong")).close_client
    assert protocol.phase is Phase.IDLE
    assert protocol.client_data_received(request()).dial
    assert len(events) == 1


def test_request_after_a_rejected_body_is_served_in_the_same_read():
    """The rejection is sent before the body arrives, so the client may already send its next request."""
    protocol, _ = create_protocol()
    rejected, following = request(credential_header="x-api-key: another", body=b"x" * 100), request()
    assert error_of(protocol.client_data_received(rejected[:-50]))[0] == 401
    effects = protocol.client_data_received(rejected[-50:] + following)
    assert (effects.dial, effects.close_client) == (True, False)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/v1/messages"),
        ("GET", "/v1/models"),
        ("HEAD", "/api/hello"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/messages/"),
        ("POST", "/v1/messages/../complete"),
        ("POST", "/v1/%6dessages"),
        ("POST", "//v1/messages"),
        ("POST", "/v1/messages?beta=true&x=1"),
        ("POST", "/v1/messages?beta=true#x"),
        ("POST", "/v1/complete"),
        ("POST", "/v1/organizations/api_keys"),
        ("POST", "http://up.example/v1/messages"),
        ("CONNECT", "evil.example:443"),
        ("OPTIONS", "*"),
    ],
)
def test_paths_and_methods_outside_the_model_api_are_rejected(method, target):
    protocol, events = create_protocol()
    effects = protocol.client_data_received(request(target, method=method))
    assert effects.to_client.startswith(b"HTTP/1.1 403 ")
    assert (effects.dial, effects.to_upstream) == (False, b"")
    assert [denied.host for denied in events.denials] == ["model"]


def test_rejected_head_request_has_a_response_without_a_body():
    protocol, _ = create_protocol()
    effects = protocol.client_data_received(request("/api/hello", method="HEAD", credential_header=None, body=b""))
    assert effects.to_client.startswith(b"HTTP/1.1 401 ")
    assert effects.to_client.endswith(b"\r\n\r\n")
    assert protocol.phase is Phase.IDLE


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens?beta=true"])
def test_endpoints_of_claude_code_are_forwarded(target):
    protocol, events = create_protocol("http://up.example")
    assert head_of(protocol.client_data_received(request(target)).to_upstream)[0] == f"POST {target} HTTP/1.1"
    assert events == []


@pytest.mark.parametrize(
    "malformed",
    [
        request("/v1/messages", "Content-Length: 3", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        request("/v1/messages", "Content-Length: 3", "Content-Length: 4"),
        request("/v1/messages", "Content-Length: +3"),
        request("/v1/messages", "Content-Length: 3, 4"),
        request("/v1/messages", "Transfer-Encoding: gzip, chunked"),
        request("/v1/messages", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        request("/v1/messages", "Transfer-Encoding: chunked", body=b"3x\r\nabc\r\n0\r\n\r\n"),
        request("/v1/messages", "X-A : b"),
        request("/v1/messages", "X-A: b\rX-B: c"),
        request("/v1/messages", "X-A: b\0"),
        request("/v1/messages", "Upgrade: websocket", "Connection: upgrade"),
        request("/v1/messages", "Host: up.example"),
        request(host="up.example"),
        request(host="127.0.0.1:80"),
        request(host="169.254.169.254"),
        request(version="1.0"),
        request(version="2.0"),
        request("/v1/mess ages"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
    ],
)
def test_malformed_request_closes_the_connection_before_dialing(malformed):
    protocol, events = create_protocol()
    effects = protocol.client_data_received(malformed)
    assert effects.to_client.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), bytes(effects.to_client)
    assert (effects.close_client, effects.dial, effects.to_upstream) == (True, False, b"")
    assert [denied.host for denied in events.denials] == ["model"]
    assert protocol.phase is Phase.CLOSING
    assert protocol.client_data_received(request()) == Effects()


@pytest.mark.parametrize("host", ["127.0.0.1:8123", "localhost:8123"])
def test_gateway_accepts_both_of_its_host_names(host):
    protocol, _ = create_protocol()
    assert protocol.client_data_received(request(host=host)).dial


def test_headers_over_the_limit_are_rejected():
    protocol, _ = create_protocol()
    fits = protocol.client_data_received(request("/v1/messages", "X-A: " + "a" * (limits.HEAD_BYTES_MAX - 500)))
    assert fits.dial
    protocol, _ = create_protocol()
    effects = protocol.client_data_received(b"POST /v1/messages HTTP/1.1\r\nX-A: " + b"a" * limits.HEAD_BYTES_MAX)
    assert effects.to_client.startswith(b"HTTP/1.1 431 ")
    assert effects.close_client


def test_content_length_over_the_limit_is_rejected():
    protocol, _ = create_protocol()
    content_length = f"Content-Length: {limits.REQUEST_BODY_BYTES_MAX + 1}"
    effects = protocol.client_data_received(request("/v1/messages", content_length, body=b""))
    assert error_of(effects)[:2] == (413, "request_too_large")
    assert (effects.dial, effects.close_client) == (False, True)


def test_chunked_body_over_the_limit_closes_both_connections():
    protocol, _ = create_protocol(is_unrestricted=True)
    protocol.client_data_received(request("/v1/messages", "Transfer-Encoding: chunked", body=b""))
    piece = chunk(bytes(1024 * 1024))
    for _ in range(limits.REQUEST_BODY_BYTES_MAX // (1024 * 1024)):
        assert protocol.client_data_received(piece).to_upstream
    effects = protocol.client_data_received(chunk(b"x"))
    assert error_of(effects)[:2] == (413, "request_too_large")
    assert (effects.close_upstream, effects.close_client, effects.to_upstream) == (True, True, b"")


# Responses


def test_response_is_streamed_and_metered():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    assert protocol.upstream_data_received(STREAM_HEAD).to_client == STREAM_HEAD
    half = len(SSE_BODY) // 2
    assert protocol.upstream_data_received(chunk(SSE_BODY[:half])).to_client == chunk(SSE_BODY[:half])
    assert protocol.upstream_data_received(chunk(SSE_BODY[half:])).to_client == chunk(SSE_BODY[half:])
    assert (protocol.is_in_flight, events) == (True, [])
    effects = protocol.upstream_data_received(b"0\r\n\r\n")
    assert effects == Effects(to_client=bytearray(b"0\r\n\r\n"))
    assert events == [STREAM_USAGE]
    assert (protocol.is_in_flight, protocol.phase) == (False, Phase.IDLE)


def test_next_request_reuses_the_upstream_connection():
    protocol, events = create_protocol()
    for turn in range(3):
        assert protocol.client_data_received(request()).dial is (turn == 0)
        protocol.upstream_data_received(STREAM)
    assert events == [STREAM_USAGE] * 3


def test_connection_closed_by_the_upstream_is_not_reused():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_data_received(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\nSet-Cookie: a=b\r\nX-Request-Id: 7\r\n\r\nhi"
    )
    assert effects.to_client == b"HTTP/1.1 200 OK\r\nX-Request-Id: 7\r\ncontent-length: 2\r\n\r\nhi"
    assert effects.close_upstream
    assert protocol.client_data_received(request()).dial


def test_idle_connection_closed_by_the_upstream_is_not_reused():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM)
    assert protocol.upstream_data_received(b"") == Effects(close_upstream=True)
    assert protocol.client_data_received(request()).dial
    assert events.errors == []


def test_idle_connection_timeout_is_not_reported():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM)
    assert protocol.upstream_failed(504, "It was idle.") == Effects(close_upstream=True)
    assert events.errors == []


def test_empty_task_key_is_rejected():
    with pytest.raises(ValueError, match="key for the agent"):
        ModelPolicy(DIALECT, "", 8123)


def test_unsolicited_upstream_data_is_discarded():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM)
    assert protocol.upstream_data_received(STREAM) == Effects(close_upstream=True)
    assert protocol.upstream_data_received(STREAM) == Effects()


def test_second_response_to_a_request_is_not_returned_for_the_next_request():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_data_received(STREAM + b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nunwanted")
    assert effects.close_upstream
    assert b"unwanted" not in effects.to_client
    assert protocol.client_data_received(request()).dial
    assert b"unwanted" not in protocol.upstream_data_received(STREAM).to_client
    assert events == [STREAM_USAGE, STREAM_USAGE]


def test_api_errors_are_forwarded_but_not_metered():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    head = b"HTTP/1.1 529 Overloaded\r\nContent-Type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert protocol.upstream_data_received(head + body).to_client == head + body
    assert events == []


def test_server_key_in_a_response_is_redacted():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    body = b'{"error":"invalid x-api-key: %b"}' % SERVER_KEY.encode()
    head = b"HTTP/1.1 400 No\r\nRequest-Id: %b\r\ncontent-length: %d\r\n\r\n" % (SERVER_KEY.encode(), len(body))
    response = b"".join(protocol.upstream_data_received(part).to_client for part in (head, body[:30], body[30:]))
    assert SERVER_KEY.encode() not in response
    assert response == (head + body).replace(SERVER_KEY.encode(), b"*" * len(SERVER_KEY))


@pytest.mark.parametrize("status", [200, 400, 529])
@pytest.mark.parametrize("encodings", [("gzip",), ("BR",), ("identity", "zstd"), ("identity, deflate",)])
def test_compressed_response_is_replaced_because_it_may_contain_the_server_key(status, encodings):
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    body = gzip.compress(SERVER_KEY.encode())
    lines = "".join(f"Content-Encoding: {one}\r\n" for one in encodings)
    head = f"HTTP/1.1 {status} OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
    effects = protocol.upstream_data_received(head + body)
    code, _, message = error_of(effects)
    assert (code, effects.close_upstream) == (502, True)
    assert "compressed" in message
    assert body not in effects.to_client
    assert events == [ErrorReported("upstream_unreachable", message)]
    assert protocol.client_data_received(request()).dial


@pytest.mark.parametrize(("status", "is_counted"), [(200, True), (529, False)])
def test_compressed_response_is_counted_at_its_maximum_cost(status, is_counted):
    protocol, events = create_protocol(budget=Budget(tokens=10_000_000))
    body = b'{"model":"claude-haiku-4-5","max_tokens":70,"messages":[]}'
    protocol.client_data_received(request("/v1/messages", body=body))
    assert protocol.upstream_connected() is None
    protocol.upstream_data_received(b"HTTP/1.1 %d OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx" % status)
    assert [one.output_tokens for one in events if isinstance(one, Usage)] == [70] * is_counted


def test_rejected_server_key_is_detected_in_a_compressed_response():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_data_received(
        b"HTTP/1.1 401 No\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"
    )
    assert error_of(effects)[0] == 403
    assert events == [KeyRejected("The model at up.example rejected the server's key (401); check the key.")]


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_response_that_declares_no_compression_is_forwarded(encoding):
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_data_received(
        STREAM.replace(b"Transfer", b"Content-Encoding: %b\r\nTransfer" % encoding.encode(), 1)
    )
    assert effects.to_client.startswith(b"HTTP/1.1 200 OK")
    assert events == [STREAM_USAGE]


ORGANIZATION = "9d50ef40-6cc8-4ca6-9d35-1dc9cf26235c"
RETURNED_HEADERS = {
    "content-type": "application/json",
    "date": "Mon, 30 Nov 2026 10:00:00 GMT",
    "request-id": "req_011",
    "retry-after": "7",
    "x-should-retry": "true",
    "anthropic-ratelimit-unified-status": "rejected",
    "anthropic-ratelimit-tokens-reset": "2026-11-30T10:00:00Z",
    "cf-ray": "1-FRA",
}
PRIVATE_HEADERS = {
    "anthropic-organization-id": ORGANIZATION,
    "anthropic-workspace-id": "wrkspc_01AbCdEf",
    "x-litellm-key-spend": "12.5",
    "x-litellm-key-alias": "team-a",
    "openai-organization": "org-abc",
    "via": "1.1 internal-proxy.corp.example",
    "server": "internal/1.2",
    "x-envoy-upstream-service-time": "5",
    "set-cookie": "session=1",
    "traceresponse": "00-1-2-01",
    "connection": "x-should-be-hop",
    "x-should-be-hop": "1",
}


@pytest.mark.parametrize("status", [200, 429])
def test_only_response_headers_that_claude_code_reads_are_returned(status):
    """Other headers may describe the account that owns the server's key, or the operator's proxies."""
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    lines = [f"{name}: {value}" for name, value in (RETURNED_HEADERS | PRIVATE_HEADERS).items()]
    response = "\r\n".join([f"HTTP/1.1 {status} X", *lines, "content-length: 2", "", "{}"]).encode()
    _, headers = head_of(protocol.upstream_data_received(response).to_client)
    assert headers == RETURNED_HEADERS | {"content-length": "2"}


RATE_LIMITED = (
    '{"type":"error","error":{"type":"rate_limit_error","message":"This request would exceed your organization\'s rate '
    f'limit of 30,000 input tokens per minute (org: {ORGANIZATION}, model: m)."}}}}'
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_account_is_masked_in_error_messages(size):
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    headers = f"anthropic-organization-id: {ORGANIZATION}\r\ncontent-length: {len(RATE_LIMITED)}"
    data = f"HTTP/1.1 429 No\r\n{headers}\r\n\r\n{RATE_LIMITED}".encode()
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    response = b"".join(protocol.upstream_data_received(part).to_client for part in parts)
    assert response.endswith(RATE_LIMITED.replace(ORGANIZATION, "*" * len(ORGANIZATION)).encode())


def test_model_text_is_unchanged_even_if_it_names_the_account():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    body = f'{{"content":[{{"type":"text","text":"org_id = {ORGANIZATION}"}}]}}'
    head = f"HTTP/1.1 200 OK\r\nanthropic-organization-id: {ORGANIZATION}\r\ncontent-length: {len(body)}\r\n\r\n"
    assert protocol.upstream_data_received((head + body).encode()).to_client.endswith(body.encode())


def test_response_of_the_count_tokens_endpoint_is_not_metered():
    protocol, events = create_protocol()
    protocol.client_data_received(request("/v1/messages/count_tokens"))
    body = b'{"input_tokens":5,"model":"m","usage":{"input_tokens":5}}'
    protocol.upstream_data_received(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert events == []


def test_response_without_readable_usage_is_reported():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\x1f\x8b")
    assert [error.error for error in events.errors] == ["usage_unread"]


def test_response_without_a_length_ends_with_the_connection():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + SSE_BODY)
    effects = protocol.upstream_data_received(b"")
    assert (effects.to_client, effects.close_upstream, effects.close_client) == (b"0\r\n\r\n", True, False)
    assert events == [STREAM_USAGE]


def test_interim_responses_are_not_forwarded():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    assert protocol.upstream_data_received(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n").to_client == b""
    assert protocol.upstream_data_received(STREAM).to_client.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_neither_followed_nor_forwarded(status):
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_data_received(
        b"HTTP/1.1 %d Moved\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n" % status
    )
    assert error_of(effects)[:2] == (502, "api_error")
    assert b"evil" not in effects.to_client
    assert (effects.close_upstream, protocol.is_in_flight) == (True, False)
    assert len(events.errors) == 1


# Failures


@pytest.mark.parametrize(("status", "kind"), [(502, "api_error"), (504, "timeout_error")])
def test_upstream_failure_before_the_response_results_in_an_error_response(status, kind):
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    effects = protocol.upstream_failed(status, "It cannot be reached.")
    assert error_of(effects) == (status, kind, "It cannot be reached.")
    assert not effects.close_client
    assert events == [ErrorReported("upstream_unreachable", "It cannot be reached.")]
    assert protocol.client_data_received(request()).dial


def test_upstream_failure_during_the_request_discards_its_body():
    protocol, _ = create_protocol(is_unrestricted=True)
    protocol.client_data_received(request("/v1/messages", "Content-Length: 10", body=b"12345"))
    assert error_of(protocol.upstream_failed(502, "Gone."))[0] == 502
    assert protocol.phase is Phase.BODY
    assert protocol.client_data_received(b"67890") == Effects()
    assert protocol.phase is Phase.IDLE


@pytest.mark.parametrize("cut", [0, 10, len(STREAM_HEAD) - 1])
def test_upstream_eof_before_the_response_results_in_an_error_response(cut):
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM_HEAD[:cut]) if cut else None
    assert error_of(protocol.upstream_data_received(b""))[:2] == (502, "api_error")


def test_truncated_response_closes_the_client_connection_and_is_metered():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM_HEAD + chunk(SSE_BODY[: SSE_BODY.rindex(b"event:")]))
    effects = protocol.upstream_data_received(b"")
    assert effects == Effects(close_upstream=True, close_client=True)
    assert events.usages == [STREAM_USAGE]
    assert [error.error for error in events.errors] == ["upstream_unreachable"]


def test_invalid_upstream_response_results_in_an_error_response():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    assert error_of(protocol.upstream_data_received(b"SSH-2.0-OpenSSH\r\n\r\n"))[0] == 502


def test_client_disconnect_closes_the_upstream_and_its_usage_is_metered():
    protocol, events = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM_HEAD + chunk(SSE_BODY))
    effects = protocol.client_data_received(b"")
    assert effects == Effects(close_upstream=True, close_client=True)
    assert events == [STREAM_USAGE]
    assert not protocol.is_in_flight
    assert protocol.upstream_data_received(b"0\r\n\r\n") == Effects()


def test_early_response_closes_the_upstream():
    protocol, _ = create_protocol(is_unrestricted=True)
    protocol.client_data_received(request("/v1/messages", "Content-Length: 10", body=b"12345"))
    effects = protocol.upstream_data_received(b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n")
    assert effects.to_client.startswith(b"HTTP/1.1 429 ")
    assert effects.close_upstream
    protocol.client_data_received(b"67890")
    assert (protocol.phase, protocol.is_in_flight) == (Phase.IDLE, False)


def test_pipelining_client_receives_one_response_and_is_disconnected():
    protocol, _ = create_protocol()
    protocol.client_data_received(request() + request())
    effects = protocol.upstream_data_received(STREAM)
    assert effects.to_client.endswith(b"0\r\n\r\n")
    assert effects.close_client


def test_client_that_sends_too_much_while_waiting_is_disconnected():
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    assert protocol.client_data_received(bytes(limits.PIPELINED_BYTES_MAX)) == Effects()
    assert protocol.client_data_received(b"x") == Effects(close_upstream=True, close_client=True)


def test_request_with_connection_close_closes_the_connection_after_the_response():
    protocol, _ = create_protocol()
    protocol.client_data_received(request("/v1/messages", "Connection: close"))
    assert protocol.upstream_data_received(STREAM).close_client


def test_phase_follows_the_progress_of_a_request():
    protocol, _ = create_protocol()
    whole = request()
    assert protocol.phase is Phase.HEAD
    protocol.client_data_received(whole[:10])
    assert protocol.phase is Phase.HEAD
    protocol.client_data_received(whole[10:-5])
    assert protocol.phase is Phase.BODY
    protocol.client_data_received(whole[-5:])
    assert protocol.phase is Phase.RESPONSE
    protocol.upstream_data_received(STREAM)
    assert protocol.phase is Phase.IDLE
    protocol.client_data_received(whole[:10])
    assert protocol.phase is Phase.HEAD


# Fragmentation and malformed input


@given(st.lists(st.integers(0, 400), max_size=12), st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_fragmentation_does_not_change_the_result(request_cuts, response_cuts):
    def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
        edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        return [data[a:b] for a, b in itertools.pairwise(edges)]

    protocol, events = create_protocol()
    sent = [protocol.client_data_received(piece) for piece in pieces(request(), request_cuts)]
    received = [protocol.upstream_data_received(piece) for piece in pieces(STREAM, response_cuts)]
    whole, _ = create_protocol()
    assert b"".join(effects.to_upstream for effects in sent) == whole.client_data_received(request()).to_upstream
    assert dechunked(b"".join(effects.to_client for effects in received)) == SSE_BODY
    assert events == [STREAM_USAGE]


def dechunked(data: bytes) -> bytes:
    rest, body = data.partition(b"\r\n\r\n")[2], b""
    while not rest.startswith(b"0\r\n"):
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=8))
def test_arbitrary_client_bytes_do_not_raise(pieces):
    protocol, _ = create_protocol()
    for piece in pieces:
        protocol.client_data_received(piece)
    protocol.client_data_received(b"")


@given(st.integers(0, len(request()) - 1), st.binary(min_size=1, max_size=4))
def test_corrupted_request_does_not_raise(at, damage):
    whole = request()
    protocol, _ = create_protocol()
    protocol.client_data_received(whole[:at] + damage + whole[at + len(damage) :])


@given(st.integers(0, len(STREAM) - 1), st.binary(min_size=1, max_size=4))
def test_corrupted_response_does_not_raise(at, damage):
    protocol, _ = create_protocol()
    protocol.client_data_received(request())
    protocol.upstream_data_received(STREAM[:at] + damage + STREAM[at + len(damage) :])
    protocol.upstream_data_received(b"")
    assert not protocol.is_in_flight
