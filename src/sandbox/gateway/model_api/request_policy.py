"""Allows only model requests that the dialect defines and that are authenticated with the task's key."""

from hmac import compare_digest

import h11
import msgspec

from sandbox.gateway.limits import REQUEST_BODY_BYTES_MAX
from sandbox.interfaces.model_dialect import ModelDialect, Rejected


class AllowedHead(msgspec.Struct, frozen=True):
    """An allowed head of a request. target: path and query at the upstream. is_metered: the response uses tokens."""

    target: bytes
    is_metered: bool


class ModelPolicy:
    """Checks the heads of requests to the model's listener on `port`."""

    def __init__(self, dialect: ModelDialect, gateway_key: str, port: int) -> None:
        if not gateway_key:
            raise ValueError("A gateway needs a key for the agent.")
        self._dialect = dialect
        self._gateway_key = gateway_key.encode()
        self._hosts = {b"127.0.0.1:%d" % port, b"localhost:%d" % port}

    def check(self, request: h11.Request) -> AllowedHead | Rejected:
        """Check the request's format first, then the key, then the target."""
        return self._check_shape(request) or self._check_key(request) or self._check_target(request)

    def _check_shape(self, request: h11.Request) -> Rejected | None:
        names = [name for name, _ in request.headers]
        if request.http_version != b"1.1":
            return _invalid("The gateway supports only HTTP/1.1.")
        if [value for name, value in request.headers if name == b"host"] not in [[host] for host in self._hosts]:
            return _invalid("The Host header must name the gateway's own address.")
        if b"upgrade" in names:
            return _invalid("The gateway does not support protocol upgrades.")
        if b"transfer-encoding" in names and b"content-length" in names:
            return _invalid("A request must not have both Content-Length and Transfer-Encoding.")
        return None

    def _check_key(self, request: h11.Request) -> Rejected | None:
        dialect = self._dialect
        keys = [
            dialect.presented_key(name, value) for name, value in request.headers if name in dialect.credential_headers
        ]
        if len(keys) == 1 and compare_digest(keys[0], self._gateway_key):
            return None
        problem = "has no key" if not keys else "has a different key" if len(keys) == 1 else "has several keys"
        return Rejected(401, f"The request {problem}; the gateway accepts only this task's key.")

    def _check_target(self, request: h11.Request) -> AllowedHead | Rejected:
        path, _, query = request.target.partition(b"?")
        endpoint = self._dialect.endpoints.get(path)
        if endpoint is None or request.method != b"POST" or query not in self._dialect.accepted_queries:
            served = " and ".join(served_path.decode() for served_path in self._dialect.endpoints)
            return Rejected(403, f"The gateway serves only POST {served}.")
        if _content_length(request) > REQUEST_BODY_BYTES_MAX:
            return too_large()
        return AllowedHead(path + (b"?" + query if query else b""), endpoint.is_metered)


def _content_length(request: h11.Request) -> int:
    # h11 rejects values other than 1 to 20 digits, and repeated headers with different values.
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def too_large() -> Rejected:
    """Return the rejection for a body that exceeds the size limit."""
    limit = REQUEST_BODY_BYTES_MAX // 1024**2
    return Rejected(413, f"The request's body is over {limit} MiB.")


def _invalid(message: str) -> Rejected:
    return Rejected(400, message)
