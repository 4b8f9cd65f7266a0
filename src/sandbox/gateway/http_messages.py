"""Reads HTTP/1.1 heads and creates the gateway's own responses, using h11. No I/O."""

from collections.abc import Iterable

import h11
import msgspec

from sandbox.gateway.limits import HEAD_BYTES_MAX
from sandbox.interfaces.gateway import ModelDialect

Headers = list[tuple[bytes, bytes]]

BODY_HEADERS = frozenset({b"content-encoding", b"content-type"})


def create_server_state() -> h11.Connection:
    """Create the h11 state for a connection from the sandbox, in which the gateway is the server."""
    return h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)


def create_client_state() -> h11.Connection:
    """Create the h11 state for a connection to the upstream, in which the gateway is the client."""
    return h11.Connection(h11.CLIENT)


def is_compressed(response: h11.Response) -> bool:
    """Return whether the body is encoded. The gateway cannot find a key or read the usage in an encoded body."""
    encodings = [value.strip().lower() for name, value in response.headers if name == b"content-encoding"]
    return any(encoding not in (b"", b"identity") for encoding in encodings)


def header(headers: Iterable[tuple[bytes, bytes]], header_name: bytes) -> bytes:
    """Return the first value of a header, or b"" if it is missing."""
    return next((value for name, value in headers if name == header_name), b"")


def has_body(request: h11.Request) -> bool:
    """Return whether the request declares a body."""
    return bool(framing_headers(request.headers))


def framing_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that determine the length of the body."""
    framing = [(name, value) for name, value in headers if name in (b"content-length", b"transfer-encoding")]
    chunked = [pair for pair in framing if pair[0] == b"transfer-encoding"]
    return chunked or framing


def connection_header_names(message: h11.Request | h11.Response) -> set[bytes]:
    """Return the names that the Connection header declares as hop-by-hop."""
    connection = b",".join(value for name, value in message.headers if name == b"connection")
    return {token.strip().lower() for token in connection.split(b",")}


class LocalResponse(msgspec.Struct, frozen=True):
    """A response created by the gateway. should_close: the connection ends after the response."""

    status: int
    content_type: bytes
    body: bytes
    should_close: bool

    def encode(self, connection: h11.Connection, method: bytes = b"") -> bytes:
        """Encode the response to a request with this method."""
        headers = [(b"content-type", self.content_type), (b"content-length", b"%d" % len(self.body))]
        if self.should_close:
            headers.append((b"connection", b"close"))
        body = b"" if method == b"HEAD" else self.body
        events = (h11.Response(status_code=self.status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        return b"".join(connection.send(event) or b"" for event in events)


def model_error(dialect: ModelDialect, status: int, message: str, *, should_close: bool = False) -> LocalResponse:
    """Create an error in the format of the model API."""
    return LocalResponse(status, b"application/json", dialect.encode_error(status, message), should_close)


def plain_text_error(status: int, message: str) -> LocalResponse:
    """Create a plain-text error that ends its connection."""
    return LocalResponse(status, b"text/plain; charset=utf-8", message.encode() + b"\n", should_close=True)
