"""A conversation with the model through the gateway, as scripts: bytes in, bytes out, and what is told."""

import gzip
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.model.budget import BudgetGate
from sandbox.gateway.model.dialer import parse_upstream
from sandbox.gateway.model.protocol import ModelProtocol
from sandbox.gateway.model.request_policy import ModelPolicy
from sandbox.gateway.protocol import Effects, Phase
from sandbox.interfaces.gateway import GatewayRules, ModelUpstream
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

TASK_KEY, SERVER_KEY = "task-key-of-this-task", "sk-the-servers-own"
BODY = b'{"model":"m","stream":true}'
SSE_BODY = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-haiku-4-5","usage":'
    b'{"input_tokens":10,"output_tokens":1}}}\n\nevent: message_delta\ndata: '
    b'{"type":"message_delta","usage":{"output_tokens":5}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
SPENT = Usage("claude-haiku-4-5", 10, 5, 0, 0, (10 + 25) / 1e6)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = STREAM_HEAD + chunk(SSE_BODY) + b"0\r\n\r\n"


def request(
    target: str = "/v1/messages?beta=true",
    *headers: str,
    method: str = "POST",
    key: str | None = f"x-api-key: {TASK_KEY}",
    host: str = "127.0.0.1:8123",
    body: bytes = BODY,
    version: str = "1.1",
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", f"Host: {host}", *([key] if key else []), *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Told(list):
    @property
    def denials(self) -> list[EgressDenied]:
        return [one for one in self if isinstance(one, EgressDenied)]

    @property
    def usages(self) -> list[Usage]:
        return [one for one in self if isinstance(one, Usage)]

    @property
    def troubles(self) -> list[ErrorReported]:
        return [one for one in self if isinstance(one, ErrorReported)]


def opened(
    base_url: str = "https://up.example/base", *, token: bool = False, key: str = SERVER_KEY, is_full: bool = False
) -> tuple[ModelProtocol, Told]:
    """is_full: the bodies of requests pass unread, as they come."""
    told = Told()
    upstream = ModelUpstream(base_url, auth_token=key) if token else ModelUpstream(base_url, api_key=key)
    policy, reports = ModelPolicy(TASK_KEY, 8123), EventReporter(told.append, lambda: 0.0)
    admission = BudgetGate(GatewayRules(egress=EgressRules(is_unrestricted=is_full)), reports)
    return ModelProtocol(policy, admission, parse_upstream(upstream), reports, 8123), told


def head_of(data: bytes | bytearray) -> tuple[str, dict[str, str]]:
    first, *lines = bytes(data).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return first, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def error_of(reaction: Effects) -> tuple[int, str, str]:
    """Status, kind and message of an answer in the Messages API's error shape."""
    head, _, body = bytes(reaction.to_client).partition(b"\r\n\r\n")
    error = json.loads(body)
    assert set(error) == {"type", "error"}
    assert error["type"] == "error"
    return int(head.split(b" ")[1]), error["error"]["type"], error["error"]["message"]


# What is let through


@pytest.mark.parametrize("is_full", [True, False])
def test_a_request_goes_on_with_the_servers_key_and_its_body(is_full):
    conversation, told = opened(is_full=is_full)
    asked = request("/v1/messages?beta=true", "anthropic-beta: a,b", "X-App: cli", "Content-Type: application/json")
    reaction = conversation.client_data_received(asked)
    assert reaction.dial
    assert not reaction.to_client
    first, headers = head_of(reaction.to_upstream)
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
    assert reaction.to_upstream.endswith(b"\r\n\r\n" + BODY)
    assert conversation.is_in_flight
    assert told == []


@pytest.mark.parametrize("key", [f"x-api-key: {TASK_KEY}", f"Authorization: Bearer {TASK_KEY}"])
@pytest.mark.parametrize("is_token", [True, False])
def test_either_kind_of_key_is_taken_and_the_servers_own_kind_is_sent(key, is_token):
    conversation, _ = opened(token=is_token)
    _, headers = head_of(conversation.client_data_received(request(key=key)).to_upstream)
    expected = {"authorization": f"Bearer {SERVER_KEY}"} if is_token else {"x-api-key": SERVER_KEY}
    assert {name: value for name, value in headers.items() if name in ("authorization", "x-api-key")} == expected


OF_CLAUDE_CODE = {
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
OF_NOBODY = {
    "X-HTTP-Method-Override": "DELETE",
    "X-HTTP-Method": "GET",
    "X-Method-Override": "GET",
    "_method": "GET",
    "X-Original-URL": "/v1/files",
    "X-Rewrite-URL": "/v1/files",
    "X-Forwarded-Host": "evil.example",
    "X-Host": "evil.example",
    "Forwarded": "host=evil.example",
    "anthropic-workspace-id": "of-another",
    "anthropic-organization-id": "of-another",
    "anthropic-user-profile-id": "of-another",
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


@pytest.mark.parametrize("is_full", [True, False])
def test_what_claude_code_says_of_itself_goes_on_and_nothing_else(is_full):
    conversation, told = opened(is_full=is_full)
    brought = [f"{name}: {value}" for name, value in (OF_CLAUDE_CODE | OF_NOBODY).items()]
    ordinary = ("Connection: keep-alive", "Accept-Encoding: gzip", "Content-Type: application/json", "Expect: x")
    sent = conversation.client_data_received(request("/v1/messages", *brought, *ordinary))
    _, headers = head_of(sent.to_upstream)
    ours = {"host", "x-api-key", "accept-encoding", "content-type", "content-length"}
    assert {name: value for name, value in headers.items() if name not in ours} == OF_CLAUDE_CODE
    assert [one.error for one in told.troubles] == ["model_headers_dropped"]
    assert "x-http-method-override, x-http-method," in told.troubles[0].message
    assert "accept-encoding" not in told.troubles[0].message


def test_what_claude_code_brings_is_dropped_without_a_word_where_it_is_about_the_connection():
    conversation, told = opened()
    brought = [f"{name}: {value}" for name, value in OF_CLAUDE_CODE.items()]
    ordinary = ("connection: keep-alive", "accept-encoding: gzip, deflate, br, zstd", "content-type: application/json")
    conversation.client_data_received(request("/v1/messages", *brought, *ordinary))
    assert told == []


def test_of_a_header_that_comes_twice_the_first_goes_on_unless_it_is_a_list():
    conversation, told = opened()
    twice = ("Anthropic-Version: 1", "anthropic-version: 2", "anthropic-beta: a", "Anthropic-Beta: b")
    sent = bytes(conversation.client_data_received(request("/v1/messages", *twice)).to_upstream)
    assert b"Anthropic-Version: 1\r\n" in sent
    assert b"anthropic-version: 2" not in sent
    assert b"anthropic-beta: a\r\n" in sent
    assert b"Anthropic-Beta: b\r\n" in sent
    assert len(told.troubles) == 1


def test_what_the_connection_names_goes_no_further_even_if_it_is_known():
    conversation, _ = opened()
    sent = conversation.client_data_received(request("/v1/messages", "Connection: close, X-App", "X-App: cli"))
    assert "x-app" not in head_of(sent.to_upstream)[1]


def test_a_folded_header_is_one_line():
    conversation, _ = opened()
    sent = conversation.client_data_received(request("/v1/messages", "X-App: cli\r\n X-HTTP-Method-Override: GET"))
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
def test_other_spellings_of_the_path_and_the_query_are_refused(target):
    conversation, _ = opened()
    assert error_of(conversation.client_data_received(request(target)))[0] == 403


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
def test_a_body_that_is_read_is_sent_as_it_was_read(encoding):
    conversation, told = opened()
    sent = conversation.client_data_received(request("/v1/messages", f"Content-Encoding: {encoding}"))
    assert "content-encoding" not in head_of(sent.to_upstream)[1]
    packed = gzip.compress(BODY)
    assert (
        error_of(opened()[0].client_data_received(request("/v1/messages", "Content-Encoding: gzip", body=packed)))[0]
        == 400
    )
    assert told == []


def test_nothing_about_the_sandbox_or_the_way_goes_on():
    conversation, _ = opened()
    private = ("Cookie: a=b", "Proxy-Authorization: x", "X-Forwarded-For: 1.2.3.4", "Forwarded: for=x", "Via: 1.1 x")
    private += (
        "X_Api_Key: of-another-account",
        "Transfer_Encoding: chunked",
        "Content_Length: 5",
    )  # one to some servers
    hops = ("Connection: keep-alive, X-Hop", "X-Hop: 1", "Keep-Alive: 5", "TE: trailers", "Accept-Encoding: gzip, br")
    sent = conversation.client_data_received(request("/v1/messages", *private, *hops))
    kept = {"host", "x-api-key", "accept-encoding", "content-type", "content-length"}
    assert set(head_of(sent.to_upstream)[1]) == kept
    assert TASK_KEY.encode() not in sent.to_upstream


def test_a_body_in_chunks_stays_in_chunks_and_loses_its_trailers():
    conversation, _ = opened(is_full=True)
    sent = conversation.client_data_received(
        request(
            "/v1/messages", "Transfer-Encoding: chunked", body=chunk(b"abc") + chunk(b"de") + b"0\r\nX-T: 1\r\n\r\n"
        )
    )
    assert head_of(sent.to_upstream)[1]["transfer-encoding"] == "chunked"
    assert sent.to_upstream.endswith(b"\r\n\r\n" + chunk(b"abc") + chunk(b"de") + b"0\r\n\r\n")


def test_a_client_that_asks_before_it_sends_is_told_to_go_on():
    conversation, _ = opened(is_full=True)
    asked = conversation.client_data_received(
        request("/v1/messages", "Expect: 100-continue", "Content-Length: 5", body=b"")
    )
    assert asked.to_client.startswith(b"HTTP/1.1 100 ")
    assert "expect" not in head_of(asked.to_upstream)[1]
    assert conversation.client_data_received(b"hello").to_upstream == b"hello"


# What is not


@pytest.mark.parametrize(
    "key",
    [
        None,
        "x-api-key: another",
        f"x-api-key: {TASK_KEY}x",
        "x-api-key: ",
        f"x-api-key: {SERVER_KEY}",
        f"Authorization: Basic {TASK_KEY}",
        f"Authorization: {TASK_KEY}",
        f"x-api-key: {TASK_KEY}\r\nx-api-key: {TASK_KEY}",
        f"x-api-key: {TASK_KEY}\r\nAuthorization: Bearer sk-mine",
        "x-api-key: \u00e9",
    ],
)
def test_another_key_or_none_or_two_is_refused_in_the_apis_own_words(key):
    conversation, told = opened()
    reaction = conversation.client_data_received(request(key=key))
    status, kind, message = error_of(reaction)
    assert (status, kind) == (401, "authentication_error")
    assert (reaction.dial, reaction.to_upstream) == (False, b"")
    assert told == [EgressDenied("model", 8123, message)]
    assert not conversation.is_in_flight


def test_after_a_refusal_the_connection_still_serves_the_right_key():
    conversation, told = opened()
    assert not conversation.client_data_received(request(key="x-api-key: wrong")).close_client
    assert conversation.phase is Phase.IDLE
    assert conversation.client_data_received(request()).dial
    assert len(told) == 1


def test_what_follows_the_body_of_a_refused_request_is_served_even_in_the_same_read():
    """The refusal went out before the body had come, so the next request may have been sent after it."""
    conversation, _ = opened()
    refused, following = request(key="x-api-key: another", body=b"x" * 100), request()
    assert error_of(conversation.client_data_received(refused[:-50]))[0] == 401
    reaction = conversation.client_data_received(refused[-50:] + following)
    assert (reaction.dial, reaction.close_client) == (True, False)


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
def test_other_paths_and_methods_are_not_offered(method, target):
    conversation, told = opened()
    reaction = conversation.client_data_received(request(target, method=method))
    assert reaction.to_client.startswith(b"HTTP/1.1 403 ")
    assert (reaction.dial, reaction.to_upstream) == (False, b"")
    assert [denied.host for denied in told.denials] == ["model"]


def test_a_refused_head_gets_a_head():
    conversation, _ = opened()
    reaction = conversation.client_data_received(request("/api/hello", method="HEAD", key=None, body=b""))
    assert reaction.to_client.startswith(b"HTTP/1.1 401 ")
    assert reaction.to_client.endswith(b"\r\n\r\n")
    assert conversation.phase is Phase.IDLE


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens?beta=true"])
def test_what_claude_code_asks_for_is_offered(target):
    conversation, told = opened("http://up.example")
    assert head_of(conversation.client_data_received(request(target)).to_upstream)[0] == f"POST {target} HTTP/1.1"
    assert told == []


@pytest.mark.parametrize(
    "smuggled",
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
def test_misshapen_requests_end_the_connection_and_reach_nobody(smuggled):
    conversation, told = opened()
    reaction = conversation.client_data_received(smuggled)
    assert reaction.to_client.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), bytes(reaction.to_client)
    assert (reaction.close_client, reaction.dial, reaction.to_upstream) == (True, False, b"")
    assert [denied.host for denied in told.denials] == ["model"]
    assert conversation.phase is Phase.CLOSING
    assert conversation.client_data_received(request()) == Effects()


@pytest.mark.parametrize("host", ["127.0.0.1:8123", "localhost:8123"])
def test_the_gateway_knows_itself_by_both_its_names(host):
    conversation, _ = opened()
    assert conversation.client_data_received(request(host=host)).dial


def test_headers_over_the_bound_are_refused():
    conversation, _ = opened()
    fits = conversation.client_data_received(request("/v1/messages", "X-A: " + "a" * (limits.HEAD_BYTES_MAX - 500)))
    assert fits.dial
    conversation, _ = opened()
    reaction = conversation.client_data_received(b"POST /v1/messages HTTP/1.1\r\nX-A: " + b"a" * limits.HEAD_BYTES_MAX)
    assert reaction.to_client.startswith(b"HTTP/1.1 431 ")
    assert reaction.close_client


def test_a_body_that_says_it_is_over_the_bound_is_refused_unseen():
    conversation, _ = opened()
    over = f"Content-Length: {limits.REQUEST_BODY_BYTES_MAX + 1}"
    reaction = conversation.client_data_received(request("/v1/messages", over, body=b""))
    assert error_of(reaction)[:2] == (413, "request_too_large")
    assert (reaction.dial, reaction.close_client) == (False, True)


def test_a_body_that_grows_over_the_bound_is_cut_off_upstream():
    conversation, _ = opened(is_full=True)
    conversation.client_data_received(request("/v1/messages", "Transfer-Encoding: chunked", body=b""))
    piece = chunk(bytes(1024 * 1024))
    for _ in range(limits.REQUEST_BODY_BYTES_MAX // (1024 * 1024)):
        assert conversation.client_data_received(piece).to_upstream
    reaction = conversation.client_data_received(chunk(b"x"))
    assert error_of(reaction)[:2] == (413, "request_too_large")
    assert (reaction.close_upstream, reaction.close_client, reaction.to_upstream) == (True, True, b"")


# The answer


def test_an_answer_streams_through_as_it_comes_and_is_counted():
    conversation, told = opened()
    conversation.client_data_received(request())
    assert conversation.upstream_data_received(STREAM_HEAD).to_client == STREAM_HEAD
    half = len(SSE_BODY) // 2
    assert conversation.upstream_data_received(chunk(SSE_BODY[:half])).to_client == chunk(SSE_BODY[:half])
    assert conversation.upstream_data_received(chunk(SSE_BODY[half:])).to_client == chunk(SSE_BODY[half:])
    assert (conversation.is_in_flight, told) == (True, [])
    reaction = conversation.upstream_data_received(b"0\r\n\r\n")
    assert reaction == Effects(to_client=bytearray(b"0\r\n\r\n"))
    assert told == [SPENT]
    assert (conversation.is_in_flight, conversation.phase) == (False, Phase.IDLE)


def test_the_next_request_of_the_same_client_uses_the_same_connection():
    conversation, told = opened()
    for turn in range(3):
        assert conversation.client_data_received(request()).dial is (turn == 0)
        conversation.upstream_data_received(STREAM)
    assert told == [SPENT] * 3


def test_a_connection_that_the_upstream_closes_is_not_used_again():
    conversation, _ = opened()
    conversation.client_data_received(request())
    answered = conversation.upstream_data_received(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\nSet-Cookie: a=b\r\nX-Request-Id: 7\r\n\r\nhi"
    )
    assert answered.to_client == b"HTTP/1.1 200 OK\r\nX-Request-Id: 7\r\ncontent-length: 2\r\n\r\nhi"
    assert answered.close_upstream
    assert conversation.client_data_received(request()).dial


def test_an_idle_connection_that_the_upstream_closes_is_not_used_again():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM)
    assert conversation.upstream_data_received(b"") == Effects(close_upstream=True)
    assert conversation.client_data_received(request()).dial
    assert told.troubles == []


def test_an_idle_connection_that_is_given_up_is_no_trouble():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM)
    assert conversation.upstream_failed(504, "It was idle.") == Effects(close_upstream=True)
    assert told.troubles == []


def test_no_key_opens_no_gateway():
    with pytest.raises(ValueError, match="task key"):
        ModelPolicy("", 8123)


def test_bytes_that_nobody_asked_the_upstream_for_reach_nobody():
    conversation, _ = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM)
    assert conversation.upstream_data_received(STREAM) == Effects(close_upstream=True)
    assert conversation.upstream_data_received(STREAM) == Effects()


def test_errors_of_the_api_pass_through_and_count_nothing():
    conversation, told = opened()
    conversation.client_data_received(request())
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    head = b"HTTP/1.1 529 Overloaded\r\nContent-Type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert conversation.upstream_data_received(head + body).to_client == head + body
    assert told == []


def test_an_upstream_that_echoes_the_servers_key_tells_it_to_nobody():
    conversation, _ = opened()
    conversation.client_data_received(request())
    body = b'{"error":"invalid x-api-key: %b"}' % SERVER_KEY.encode()
    head = b"HTTP/1.1 400 No\r\nX-Seen: %b\r\ncontent-length: %d\r\n\r\n" % (SERVER_KEY.encode(), len(body))
    answer = b"".join(conversation.upstream_data_received(part).to_client for part in (head, body[:30], body[30:]))
    assert SERVER_KEY.encode() not in answer
    assert answer == (head + body).replace(SERVER_KEY.encode(), b"*" * len(SERVER_KEY))


def test_counting_tokens_spends_none():
    conversation, told = opened()
    conversation.client_data_received(request("/v1/messages/count_tokens"))
    body = b'{"input_tokens":5,"model":"m","usage":{"input_tokens":5}}'
    conversation.upstream_data_received(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert told == []


def test_an_answer_that_tells_no_usage_is_told_as_trouble():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"
    )
    assert [trouble.error for trouble in told.troubles] == ["usage_unread"]


def test_an_answer_without_framing_ends_with_its_connection():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + SSE_BODY)
    ended = conversation.upstream_data_received(b"")
    assert (ended.to_client, ended.close_upstream, ended.close_client) == (b"0\r\n\r\n", True, False)
    assert told == [SPENT]


def test_interim_answers_are_kept_back():
    conversation, _ = opened()
    conversation.client_data_received(request())
    assert conversation.upstream_data_received(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n").to_client == b""
    assert conversation.upstream_data_received(STREAM).to_client.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_neither_followed_nor_passed_on(status):
    conversation, told = opened()
    conversation.client_data_received(request())
    reaction = conversation.upstream_data_received(
        b"HTTP/1.1 %d Moved\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n" % status
    )
    assert error_of(reaction)[:2] == (502, "api_error")
    assert b"evil" not in reaction.to_client
    assert (reaction.close_upstream, conversation.is_in_flight) == (True, False)
    assert len(told.troubles) == 1


# What goes wrong


@pytest.mark.parametrize(("status", "kind"), [(502, "api_error"), (504, "timeout_error")])
def test_an_upstream_that_fails_before_its_answer_is_an_error_and_the_connection_goes_on(status, kind):
    conversation, told = opened()
    conversation.client_data_received(request())
    reaction = conversation.upstream_failed(status, "It cannot be reached.")
    assert error_of(reaction) == (status, kind, "It cannot be reached.")
    assert not reaction.close_client
    assert told == [ErrorReported("upstream_unreachable", "It cannot be reached.")]
    assert conversation.client_data_received(request()).dial


def test_an_upstream_that_fails_while_the_request_is_still_coming_lets_it_come():
    conversation, _ = opened(is_full=True)
    conversation.client_data_received(request("/v1/messages", "Content-Length: 10", body=b"12345"))
    assert error_of(conversation.upstream_failed(502, "Gone."))[0] == 502
    assert conversation.phase is Phase.BODY
    assert conversation.client_data_received(b"67890") == Effects()
    assert conversation.phase is Phase.IDLE


@pytest.mark.parametrize("cut", [0, 10, len(STREAM_HEAD) - 1])
def test_an_upstream_that_ends_before_its_answer_is_an_error(cut):
    conversation, _ = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM_HEAD[:cut]) if cut else None
    assert error_of(conversation.upstream_data_received(b""))[:2] == (502, "api_error")


def test_an_answer_that_breaks_off_ends_without_a_proper_end_and_is_counted():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM_HEAD + chunk(SSE_BODY[: SSE_BODY.rindex(b"event:")]))
    broken = conversation.upstream_data_received(b"")
    assert broken == Effects(close_upstream=True, close_client=True)
    assert told.usages == [SPENT]
    assert [trouble.error for trouble in told.troubles] == ["upstream_unreachable"]


def test_an_upstream_that_talks_nonsense_is_an_error():
    conversation, _ = opened()
    conversation.client_data_received(request())
    assert error_of(conversation.upstream_data_received(b"SSH-2.0-OpenSSH\r\n\r\n"))[0] == 502


def test_a_client_that_leaves_ends_its_request_upstream_and_is_counted():
    conversation, told = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM_HEAD + chunk(SSE_BODY))
    left = conversation.client_data_received(b"")
    assert left == Effects(close_upstream=True, close_client=True)
    assert told == [SPENT]
    assert not conversation.is_in_flight
    assert conversation.upstream_data_received(b"0\r\n\r\n") == Effects()


def test_an_early_answer_ends_the_request_upstream():
    conversation, _ = opened(is_full=True)
    conversation.client_data_received(request("/v1/messages", "Content-Length: 10", body=b"12345"))
    answered = conversation.upstream_data_received(b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n")
    assert answered.to_client.startswith(b"HTTP/1.1 429 ")
    assert answered.close_upstream
    conversation.client_data_received(b"67890")
    assert (conversation.phase, conversation.is_in_flight) == (Phase.IDLE, False)


def test_a_client_that_does_not_wait_for_its_answer_gets_it_and_then_the_end():
    conversation, _ = opened()
    conversation.client_data_received(request() + request())
    answered = conversation.upstream_data_received(STREAM)
    assert answered.to_client.endswith(b"0\r\n\r\n")
    assert answered.close_client


def test_a_client_that_floods_while_it_waits_is_cut_off():
    conversation, _ = opened()
    conversation.client_data_received(request())
    assert conversation.client_data_received(bytes(limits.PIPELINED_BYTES_MAX)) == Effects()
    assert conversation.client_data_received(b"x") == Effects(close_upstream=True, close_client=True)


def test_a_client_that_says_it_will_close_is_let_go_after_its_answer():
    conversation, _ = opened()
    conversation.client_data_received(request("/v1/messages", "Connection: close"))
    assert conversation.upstream_data_received(STREAM).close_client


def test_the_phases_of_a_conversation():
    conversation, _ = opened()
    whole = request()
    assert conversation.phase is Phase.HEAD
    conversation.client_data_received(whole[:10])
    assert conversation.phase is Phase.HEAD
    conversation.client_data_received(whole[10:-5])
    assert conversation.phase is Phase.BODY
    conversation.client_data_received(whole[-5:])
    assert conversation.phase is Phase.RESPONSE
    conversation.upstream_data_received(STREAM)
    assert conversation.phase is Phase.IDLE
    conversation.client_data_received(whole[:10])
    assert conversation.phase is Phase.HEAD


# However it is cut


@given(st.lists(st.integers(0, 400), max_size=12), st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_it_does_not_matter_where_the_bytes_are_cut(request_cuts, answer_cuts):
    def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
        edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        return [data[a:b] for a, b in itertools.pairwise(edges)]

    conversation, told = opened()
    sent = [conversation.client_data_received(piece) for piece in pieces(request(), request_cuts)]
    got = [conversation.upstream_data_received(piece) for piece in pieces(STREAM, answer_cuts)]
    whole, _ = opened()
    assert b"".join(one.to_upstream for one in sent) == whole.client_data_received(request()).to_upstream
    assert dechunked(b"".join(one.to_client for one in got)) == SSE_BODY
    assert told == [SPENT]


def dechunked(data: bytes) -> bytes:
    rest, body = data.partition(b"\r\n\r\n")[2], b""
    while not rest.startswith(b"0\r\n"):
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=8))
def test_no_bytes_from_inside_make_it_raise(pieces):
    conversation, _ = opened()
    for piece in pieces:
        conversation.client_data_received(piece)
    conversation.client_data_received(b"")


@given(st.integers(0, len(request()) - 1), st.binary(min_size=1, max_size=4))
def test_no_damaged_request_makes_it_raise(at, damage):
    whole = request()
    conversation, _ = opened()
    conversation.client_data_received(whole[:at] + damage + whole[at + len(damage) :])


@given(st.integers(0, len(STREAM) - 1), st.binary(min_size=1, max_size=4))
def test_no_damaged_answer_makes_it_raise(at, damage):
    conversation, _ = opened()
    conversation.client_data_received(request())
    conversation.upstream_data_received(STREAM[:at] + damage + STREAM[at + len(damage) :])
    conversation.upstream_data_received(b"")
    assert not conversation.is_in_flight
