"""Which model requests are let through: an allow-list of what Claude Code sends, with the task's own key."""

from hmac import compare_digest

import h11
import msgspec

from sandbox.gateway.limits import REQUEST_BODY_BYTES_MAX


class Allowed(msgspec.Struct, frozen=True):
    """Let through to this path and query of the upstream. `is_metered`: its answer spends tokens."""

    target: bytes
    is_metered: bool


class Rejected(msgspec.Struct, frozen=True):
    """Not let through. `kind` is the Messages API's word, `message` a sentence for people."""

    status: int
    error_type: str
    message: str


_ENDPOINTS = {b"/v1/messages": True, b"/v1/messages/count_tokens": False}
_QUERIES = (b"", b"beta=true")


class ModelPolicy:
    """Judges the heads of requests to the model's listener on `port`."""

    def __init__(self, task_key: str, port: int) -> None:
        if not task_key:
            raise ValueError("A gateway needs a task key.")
        self._task_key = task_key.encode()
        self._hosts = {b"127.0.0.1:%d" % port, b"localhost:%d" % port}

    def check(self, request: h11.Request) -> Allowed | Rejected:
        """Shape first, then the key, then what is asked for."""
        return self._check_shape(request) or self._check_key(request) or _check_target(request)

    def _check_shape(self, request: h11.Request) -> Rejected | None:
        names = [name for name, _ in request.headers]
        if request.http_version != b"1.1":
            return _invalid("The gateway speaks HTTP/1.1 only.")
        if [value for name, value in request.headers if name == b"host"] not in [[host] for host in self._hosts]:
            return _invalid("The Host header must name the gateway's own address.")
        if b"upgrade" in names:
            return _invalid("The gateway switches to no other protocol.")
        if b"transfer-encoding" in names and b"content-length" in names:
            return _invalid("A request has either Content-Length or Transfer-Encoding, not both.")
        return None

    def _check_key(self, request: h11.Request) -> Rejected | None:
        keys = [
            _presented_key(name, value) for name, value in request.headers if name in (b"x-api-key", b"authorization")
        ]
        if len(keys) == 1 and compare_digest(keys[0], self._task_key):
            return None
        problem = "brings no key" if not keys else "brings another key" if len(keys) == 1 else "brings several keys"
        return Rejected(401, "authentication_error", f"The request {problem}; the gateway takes this task's key only.")


def _presented_key(name: bytes, value: bytes) -> bytes:
    if name == b"x-api-key":
        return value
    scheme, _, token = value.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _check_target(request: h11.Request) -> Allowed | Rejected:
    path, _, query = request.target.partition(b"?")
    is_metered = _ENDPOINTS.get(path)
    if is_metered is None or request.method != b"POST" or query not in _QUERIES:
        return Rejected(403, "permission_error", "The gateway offers POST /v1/messages and its count_tokens only.")
    if _content_length(request) > REQUEST_BODY_BYTES_MAX:
        return too_large()
    return Allowed(path + (b"?" + query if query else b""), is_metered)


def _content_length(request: h11.Request) -> int:
    # h11 lets digits through only, at most 20 of them, and repeated headers only when they agree.
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def too_large() -> Rejected:
    """The body is over the bound."""
    limit = REQUEST_BODY_BYTES_MAX // 1024**2
    return Rejected(413, "request_too_large", f"The request's body is over {limit} MiB.")


def _invalid(message: str) -> Rejected:
    return Rejected(400, "invalid_request_error", message)


Headers = list[tuple[bytes, bytes]]

_FORWARDED = frozenset(
    {
        b"accept",
        b"accept-language",
        b"anthropic-beta",
        b"anthropic-client-feature",
        b"anthropic-client-os",
        b"anthropic-client-platform",
        b"anthropic-client-version",
        b"anthropic-dangerous-direct-browser-access",
        b"anthropic-version",
        b"user-agent",
        b"x-anthropic-additional-protection",
        b"x-app",
        b"x-client-app",
        b"x-client-request-id",
    }
)
_FORWARDED_PREFIXES = (b"x-claude-code-", b"x-stainless-")
"""Beginnings of the names of all that Claude Code and its library tell of themselves."""

_LIST_HEADERS = frozenset({b"accept", b"anthropic-beta"})
"""What may come in several lines; of others the first counts."""

_BODY_HEADERS = frozenset({b"content-type", b"content-encoding"})
_CONNECTION_HEADERS = frozenset(
    {
        b"accept-encoding",
        b"authorization",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"x-api-key",
    }
)
"""What every client sends to the gateway itself: it answers them or sets its own."""


def connection_header_names(message: h11.Request | h11.Response) -> set[bytes]:
    """The headers that the sender wants to go no further than this."""
    connection = b",".join(value for name, value in message.headers if name == b"connection")
    return {token.strip().lower() for token in connection.split(b",")}


def select_headers(request: h11.Request, *, is_body_unchanged: bool) -> tuple[Headers, list[bytes]]:
    """The headers that go on, spelt as they came, and the names of those that were dropped.

    with_body: the body goes on as it came, so what says how to read it does too.
    """
    taken = _FORWARDED | _BODY_HEADERS if is_body_unchanged else _FORWARDED
    expected = _CONNECTION_HEADERS if is_body_unchanged else _CONNECTION_HEADERS | _BODY_HEADERS
    named = connection_header_names(request)
    forwarded: Headers = []
    dropped: list[bytes] = []
    seen_names: set[bytes] = set()
    for original, value in request.headers.raw_items():
        name = original.lower()
        if name in expected:
            continue
        is_known = name in taken or name.startswith(_FORWARDED_PREFIXES)
        if is_known and name not in named and (name not in seen_names or name in _LIST_HEADERS):
            seen_names.add(name)
            forwarded.append((original, value))
        else:
            dropped.append(name)
    return forwarded, dropped
