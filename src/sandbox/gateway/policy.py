"""Which model requests are let through: an allow-list of what Claude Code sends, with the task's own key."""

from hmac import compare_digest

import h11
import msgspec

from sandbox.gateway.limits import REQUEST_BODY_BYTES_MAX


class Allowed(msgspec.Struct, frozen=True):
    """Let through to this path and query of the upstream. `is_metered`: its answer spends tokens."""

    target: bytes
    is_metered: bool


class Refused(msgspec.Struct, frozen=True):
    """Not let through. `kind` is the Messages API's word, `message` a sentence for people."""

    status: int
    kind: str
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

    def judge(self, request: h11.Request) -> Allowed | Refused:
        """Shape first, then the key, then what is asked for."""
        return self._misshapen(request) or self._unauthorised(request) or _judge_target(request)

    def _misshapen(self, request: h11.Request) -> Refused | None:
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

    def _unauthorised(self, request: h11.Request) -> Refused | None:
        keys = [_key(name, value) for name, value in request.headers if name in (b"x-api-key", b"authorization")]
        if len(keys) == 1 and compare_digest(keys[0], self._task_key):
            return None
        told = "brings no key" if not keys else "brings another key" if len(keys) == 1 else "brings several keys"
        return Refused(401, "authentication_error", f"The request {told}; the gateway takes this task's key only.")


def _key(name: bytes, value: bytes) -> bytes:
    if name == b"x-api-key":
        return value
    scheme, _, token = value.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _judge_target(request: h11.Request) -> Allowed | Refused:
    path, _, query = request.target.partition(b"?")
    is_metered = _ENDPOINTS.get(path)
    if is_metered is None or request.method != b"POST" or query not in _QUERIES:
        return Refused(403, "permission_error", "The gateway offers POST /v1/messages and its count_tokens only.")
    if _content_length(request) > REQUEST_BODY_BYTES_MAX:
        return too_large()
    return Allowed(path + (b"?" + query if query else b""), is_metered)


def _content_length(request: h11.Request) -> int:
    # h11 lets digits through only, at most 20 of them, and repeated headers only when they agree.
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def too_large() -> Refused:
    """The body is over the bound."""
    limit = REQUEST_BODY_BYTES_MAX // 1024**2
    return Refused(413, "request_too_large", f"The request's body is over {limit} MiB.")


def _invalid(message: str) -> Refused:
    return Refused(400, "invalid_request_error", message)
