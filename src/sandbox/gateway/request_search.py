"""Looks for an HTTP request in what a client says, as lenient servers may read it."""

import re

from sandbox.gateway.egress import normal
from sandbox.gateway.http_target import parse_authority

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_SPACE = rb"[^\x21-\x7e]"  # whatever does not show: some server takes it for white space
_ABSOLUTE = rb"[A-Za-z][A-Za-z0-9+.-]*://"
_BEFORE = re.compile(rb"[^\x21-\x7e]*")
_PROXY_LINE = re.compile(rb"PROXY(%s|\Z)" % _SPACE, re.IGNORECASE)
_VERSIONED_LINE = re.compile(
    rb"%s+%s.*%s(HTTP|RTSP|ICE)/|[\x21-\x7e]+%s.*%sHTTP/[0-9][0-9.]*%s*\Z" % (_TOKEN, *[_SPACE] * 5),
    re.IGNORECASE | re.DOTALL,
)
_SIMPLE_LINE = re.compile(rb"[A-Z]{3,}%s+/" % _SPACE)
_ABSOLUTE_LINE = re.compile(rb"[\x21-\x39\x3b-\x7e]{3,}%s+%s" % (_SPACE, _ABSOLUTE))
_WORDS = re.compile(rb"[\x21-\x7e]+%s[ \t\r]*[^ \t\r]" % _SPACE)
_TARGET = re.compile(rb"[A-Za-z]%s+(/|\*|%s)" % (_SPACE, _ABSOLUTE))
_VERSION = re.compile(rb"%sHTTP/[0-9][0-9.]*(%s|\Z)" % (_SPACE, _SPACE), re.IGNORECASE)
_VERSION_BEGUN = re.compile(rb"%sHTTP/[0-9]" % _SPACE, re.IGNORECASE)
_CONNECTION_LINE = re.compile(rb"%s*(proxy-)?connection%s*:" % (_SPACE, _SPACE), re.IGNORECASE)
_HOST_LINE = re.compile(rb"%s*host%s*:(.*)" % (_SPACE, _SPACE), re.IGNORECASE | re.DOTALL)


class RequestSearch:
    """For one client that speaks to `name` at `port`. `line_end`: what ends a line.

    is_like_request: the first line has two words, or a later one has a version. Some servers take two words for a
    request without a version, answer it, and read another one.
    """

    def __init__(self, name: str, port: int, line_end: re.Pattern[bytes]) -> None:
        self._name = name
        self._port = port
        self._line_end = line_end
        self._line_begin = 0
        self._searched = 0
        self._has_first_line = False
        self.is_like_request = False

    def objection(self, seen: bytearray, *, is_last: bool) -> str | None:
        """What is wrong with a line in all that the client has said so far; is_last: no more of it will be seen."""
        while (end := self._line_end.search(seen, self._searched)) is not None:
            objection = self._line_objection(bytes(seen[self._line_begin : end.start()]))
            self._line_begin = self._searched = end.end()
            if objection is not None:
                return objection
        self._searched = len(seen)
        return self._line_objection(bytes(seen[self._line_begin :])) if is_last else None

    def _line_objection(self, line: bytes) -> str | None:
        if not self._has_first_line:
            line = _BEFORE.sub(b"", line, count=1)
            if not line:
                return None
            self._has_first_line = True
            self.is_like_request = _WORDS.match(line) is not None
            if _PROXY_LINE.match(line):
                return "a PROXY protocol header stands before it."
            if any(odd.match(line) for odd in (_VERSIONED_LINE, _SIMPLE_LINE, _ABSOLUTE_LINE)):
                return "its first line is HTTP that servers read differently."
        elif self.is_like_request:
            objection = self._header_objection(line)
            if objection is not None:
                return objection
        else:
            self.is_like_request = _VERSION_BEGUN.search(line) is not None
        version = max((found.start() for found in _VERSION.finditer(line)), default=0)
        return "an HTTP request stands behind other bytes." if _TARGET.search(line, 0, version) else None

    def _header_objection(self, line: bytes) -> str | None:
        if _ABSOLUTE_LINE.match(line) or _CONNECTION_LINE.match(line):
            return "it is HTTP that servers read differently."
        host = _HOST_LINE.match(line)
        if host is None:
            return None
        asked = parse_authority(host[1].strip(), default_port=self._port)
        is_right = asked is not None and (normal(asked.host), asked.port) == (normal(self._name), self._port)
        return None if is_right else f"the connection is to {self._name}, but its Host header asks for another."
