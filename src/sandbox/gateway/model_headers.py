"""Which headers of a model request go on: those that Claude Code sends about itself and its request, and no others.

Whatever else a server in front of the model might act on (another method, another workspace, another user, a tool of
its own) would act with the server's key.
"""

import h11

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
_FAMILIES = (b"x-claude-code-", b"x-stainless-")
"""Beginnings of the names of all that Claude Code and its library tell of themselves."""

_LISTS = frozenset({b"accept", b"anthropic-beta"})
"""What may come in several lines; of others the first counts."""

_ABOUT_THE_BODY = frozenset({b"content-type", b"content-encoding"})
_OF_THIS_CONNECTION = frozenset(
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


def named_by_connection(message: h11.Request | h11.Response) -> set[bytes]:
    """The headers that the sender wants to go no further than this."""
    connection = b",".join(value for name, value in message.headers if name == b"connection")
    return {token.strip().lower() for token in connection.split(b",")}


def sift(request: h11.Request, *, with_body: bool) -> tuple[Headers, list[bytes]]:
    """The headers that go on, spelt as they came, and the names of those that were dropped.

    with_body: the body goes on as it came, so what says how to read it does too.
    """
    taken = _FORWARDED | _ABOUT_THE_BODY if with_body else _FORWARDED
    expected = _OF_THIS_CONNECTION if with_body else _OF_THIS_CONNECTION | _ABOUT_THE_BODY
    named = named_by_connection(request)
    forwarded: Headers = []
    dropped: list[bytes] = []
    seen: set[bytes] = set()
    for spelt, value in request.headers.raw_items():
        name = spelt.lower()
        if name in expected:
            continue
        is_known = name in taken or name.startswith(_FAMILIES)
        if is_known and name not in named and (name not in seen or name in _LISTS):
            seen.add(name)
            forwarded.append((spelt, value))
        else:
            dropped.append(name)
    return forwarded, dropped
