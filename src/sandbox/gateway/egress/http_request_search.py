"""Finds an HTTP request in the data of an unknown protocol."""

import re

from sandbox.gateway.egress.http_request_target import parse_authority
from sandbox.gateway.egress.policy import normalize_host

TCHAR = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""Matches one character of a token, such as a request's method (tchar, RFC 9110 §5.6.2)."""

_NON_PRINTABLE = rb"[^\x21-\x7e]"  # any byte that is not printable: some servers treat it as white space
_ABSOLUTE = rb"(?!(?<=\0{3})opc\.tcp:)[A-Za-z][A-Za-z0-9+.-]*://"  # except in an OPC UA hello
_LEADING_INVISIBLE = re.compile(rb"[^\x21-\x7e]*")
_PROXY_LINE = re.compile(rb"PROXY(%s|\Z)" % _NON_PRINTABLE, re.IGNORECASE)
_VERSIONED_LINE = re.compile(
    rb"%s+%s.*%s(HTTP|RTSP|ICE)/|[\x21-\x7e]+%s.*%sHTTP/[0-9][0-9.]*%s*\Z" % (TCHAR, *[_NON_PRINTABLE] * 5),
    re.IGNORECASE | re.DOTALL,
)
_SIMPLE_LINE = re.compile(rb"[A-Z]{3,}%s+/" % _NON_PRINTABLE)
_ABSOLUTE_LINE = re.compile(rb"[\x21-\x39\x3b-\x7e]{3,}%s+%s" % (_NON_PRINTABLE, _ABSOLUTE))
_ABSOLUTE_AFTER_ANY_METHOD = re.compile(rb"[^ ]* +%s[\x21-\x7e]*%s+[\x21-\x7e]" % (_ABSOLUTE, _NON_PRINTABLE))
"""Matches a request line with an absolute URL. Some servers accept any method, even an empty one, and any version."""

_ABSOLUTE_FIRST_LINE = re.compile(rb"[^ \t]*[ \t]+%s" % _ABSOLUTE)
_CONNECT_LINE = re.compile(rb"CONNECT%s+[!-z]" % _NON_PRINTABLE)
"""Matches a CONNECT request with or without a version, because some servers do not require one.

CONNECT followed by JSON, the first line of NATS, is excluded.
"""

_EMPTY_LINE_ENDS = (b"\n\r\n", b"\n\n", b"\r\r")
_TWO_WORDS = re.compile(rb"[\x21-\x7e]+%s[ \t\r]*[^ \t\r]" % _NON_PRINTABLE)
_TARGET = re.compile(rb"[A-Za-z]%s+(/|\*|%s)" % (_NON_PRINTABLE, _ABSOLUTE))
_VERSION = re.compile(rb"%sHTTP/[0-9][0-9.]*(%s|\Z)" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE)
_VERSION_START = re.compile(rb"%sHTTP/[0-9]" % _NON_PRINTABLE, re.IGNORECASE)
_CONNECTION_LINE = re.compile(rb"%s*(proxy-)?connection%s*:" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE)
_HOST_LINE = re.compile(rb"%s*host%s*:(.*)" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE | re.DOTALL)


class HttpRequestSearch:
    """Searches for an HTTP request in the data of a client connected to `name` on `port`. line_end: matches a line end.

    is_possible_request: the first line has two words, or a later one has an HTTP version. Some servers treat a line of
    two words as a request without a version (HTTP/0.9), respond to it, and read another request.
    """

    def __init__(self, name: str, port: int, line_end: re.Pattern[bytes]) -> None:
        self._name = name
        self._port = port
        self._line_end = line_end
        self._line_start = 0
        self._searched = 0
        self._has_first_line = False
        self._has_empty_line = False
        self.is_possible_request = False

    def deny_reason(self, received: bytearray, *, is_last: bool) -> str | None:
        """Return why a line in the bytes received so far is denied, or None.

        is_last: no more bytes will be searched.
        """
        while (end := self._line_end.search(received, self._searched)) is not None:
            reason = self._line_deny_reason(bytes(received[self._line_start : end.start()]))
            self._has_empty_line |= received[max(0, end.end() - 3) : end.end()].endswith(_EMPTY_LINE_ENDS)
            self._line_start = self._searched = end.end()
            if reason is not None:
                return reason
        self._searched = len(received)
        return self._line_deny_reason(bytes(received[self._line_start :])) if is_last else None

    def _line_deny_reason(self, line: bytes) -> str | None:
        may_start_request = not self._has_first_line or (self._has_empty_line and self.is_possible_request)
        if may_start_request and _ABSOLUTE_AFTER_ANY_METHOD.match(line):
            return "the connection contains HTTP that servers may interpret differently."
        if not self._has_first_line:
            is_absolute = _ABSOLUTE_FIRST_LINE.match(line) is not None
            line = _LEADING_INVISIBLE.sub(b"", line, count=1)
            if not line:
                return None
            self._has_first_line = True
            self.is_possible_request = _TWO_WORDS.match(line) is not None
            if _PROXY_LINE.match(line):
                return "the connection starts with a PROXY protocol header."
            patterns = (_VERSIONED_LINE, _SIMPLE_LINE, _ABSOLUTE_LINE, _CONNECT_LINE)
            if is_absolute or any(pattern.match(line) for pattern in patterns):
                return "the connection's first line is HTTP that servers may interpret differently."
        elif self.is_possible_request:
            reason = self._header_deny_reason(line)
            if reason is not None:
                return reason
        else:
            self.is_possible_request = _VERSION_START.search(line) is not None
        version = max((match.start() for match in _VERSION.finditer(line)), default=0)
        has_request = _TARGET.search(line, 0, version) is not None
        return "the connection contains an HTTP request after other bytes." if has_request else None

    def _header_deny_reason(self, line: bytes) -> str | None:
        if _ABSOLUTE_LINE.match(line) or _CONNECTION_LINE.match(line):
            return "the connection contains HTTP that servers may interpret differently."
        host = _HOST_LINE.match(line)
        if host is None:
            return None
        requested = parse_authority(host[1].strip(), default_port=self._port)
        is_allowed = requested is not None and (normalize_host(requested.host), requested.port) == (
            normalize_host(self._name),
            self._port,
        )
        return None if is_allowed else f"the connection is to {self._name}, but its Host header names a different host."


LINE_ENDS = (re.compile(rb"\n"), re.compile(rb"[\r\n]"))
"""Patterns of a line end. Some servers end a line at a bare carriage return; others treat it as white space."""
