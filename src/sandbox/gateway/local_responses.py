"""Responses that the gateway creates itself."""

import h11
import msgspec

from sandbox.interfaces.model_dialect import ModelDialect


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
