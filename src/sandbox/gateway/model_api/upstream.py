"""The model API: its address, its credential, and the redaction of the credential and its account in responses.

Responses may repeat the headers of a request, and error messages may name the account.
"""

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from urllib.parse import urlsplit

import msgspec

from sandbox.interfaces.gateway import ModelDialect, ModelUpstream

_VALUE_BYTES_MIN = 8
"""Minimum length of a value to redact; shorter values cannot be distinguished from other text."""

_ACCOUNT_BYTES_MAX = 256
"""Maximum length of an account's name that is redacted. A longer value is not redacted."""

_BACKSLASH = 0x5C
_SHORT_ESCAPES = b'"/\\'
"""Characters that JSON may escape with only a backslash."""

_BACKSLASHES_MAX = 8
"""Maximum number of backslashes before an escaped character. Each of at most three levels of JSON doubles them."""

_START_LENGTH = 8
"""Number of characters at the start of the value that are searched for with a regular expression."""

_SPELLING_BYTES_MAX = _BACKSLASHES_MAX + len("u0000")


class ValueRedactor:
    """Replaces one value, such as a key, with asterisks. Lengths do not change.

    Each character of the value may be escaped as in JSON (`\\u003d`, `\\/`), even in nested JSON. Thread-safe: all
    connections of a gateway share one redactor.
    """

    def __init__(self, value: bytes) -> None:
        self._value = value if len(value) >= _VALUE_BYTES_MIN else b""
        self._mask = b"*" * len(self._value)
        self._pattern = re.compile(b"".join(map(_encoding_pattern, self._value)))
        self._starts = re.compile(_start_pattern(self._value))
        self._escapes = [rb"\u00", *(b"\\" + bytes([one]) for one in _SHORT_ESCAPES if one in self._value)]

    def redact(self, text: bytes) -> bytes:
        """Replace the value in a complete text."""
        if not self._value:
            return text
        if b"\\" not in text or not any(escape in text for escape in self._escapes):
            return text.replace(self._value, self._mask)
        return self._pattern.sub(lambda match: b"*" * len(match[0]), text)

    def find_unfinished(self, text: bytes) -> int:
        """Return the position in `text` from which the rest may be the start of the value, or the length of `text`."""
        if not self._value:
            return len(text)
        first = max(0, len(text) - _SPELLING_BYTES_MAX * len(self._value) + 1)
        starts = (match.start() for match in self._starts.finditer(text, first))
        return next((at for at in starts if self._may_start(text, at)), len(text))

    def _may_start(self, text: bytes, at: int) -> bool:
        """Return whether the text from offset `at` to the end may be the start of the value, plain or escaped.

        A backslash may be a character of the value or the start of an escape, so several positions are possible.
        """
        positions = {at}
        for character in self._value:
            rests = {position: text[position : position + _SPELLING_BYTES_MAX] for position in positions}
            if any(_is_unfinished(rest, character) for rest in rests.values()):
                return True
            positions = {
                position + length for position, rest in rests.items() for length in _encoding_lengths(rest, character)
            }
        return False


def account_redactors(headers: Iterable[tuple[bytes, bytes]], names: Container[bytes]) -> list[ValueRedactor]:
    """Return redactors for the values of the headers that identify the account of the server's key.

    Error messages may repeat these values.
    """
    values = {value for name, value in headers if name in names and len(value) <= _ACCOUNT_BYTES_MAX}
    return [ValueRedactor(value) for value in sorted(values)]


class BodyRedactor:
    """Replaces values in one response body, however the body is split.

    Only bytes that may be the start of a value are held back until more bytes arrive.
    """

    def __init__(self, redactors: Sequence[ValueRedactor]) -> None:
        self._pending = [(redactor, b"") for redactor in redactors]

    def feed(self, data: bytes) -> bytes:
        """Add the next bytes of the body; return the bytes that can be sent."""
        return self._feed(data, is_end=False)

    def flush(self) -> bytes:
        """Return the bytes held back. Call this at the end of the body."""
        return self._feed(b"", is_end=True)

    def _feed(self, data: bytes, *, is_end: bool) -> bytes:
        for number, (redactor, pending) in enumerate(self._pending):
            clean = redactor.redact(pending + data)
            end = len(clean) if is_end else redactor.find_unfinished(clean)
            self._pending[number] = redactor, clean[end:]
            data = clean[:end]
        return data


def _start_pattern(value: bytes) -> bytes:
    """Return a pattern for the positions where the value may start. The pattern rules out most positions quickly.

    The pattern matches the first few characters of the value, or fewer of them at the end of the text.
    """
    pattern = b""
    for character in reversed(value[:_START_LENGTH]):
        pattern = rb"(?:%b%b|%b\Z)" % (_encoding_pattern(character), pattern, _incomplete_pattern(character))
    return pattern


def _split_backslashes(text: bytes) -> tuple[int, bytes]:
    """Return the number of backslashes at the start of the text, and the text after them."""
    rest = text.lstrip(b"\\")
    return len(text) - len(rest), rest


def _is_unfinished(text: bytes, character: int) -> bool:
    """Return whether the text may be an incomplete encoding of the character, to be completed by later text."""
    backslashes, rest = _split_backslashes(text)
    if backslashes > _BACKSLASHES_MAX:
        return False
    escape = b"u%04x" % character
    return not rest or (backslashes > 0 and len(rest) < len(escape) and escape.startswith(_lower_digits(rest)))


def _encoding_lengths(text: bytes, character: int) -> Iterator[int]:
    """Yield the length of each encoding of the character that the text may start with."""
    backslashes, rest = _split_backslashes(text)
    if character == _BACKSLASH:
        yield from range(1, min(backslashes, _BACKSLASHES_MAX) + 1)
    if backslashes > _BACKSLASHES_MAX:
        return
    if rest.startswith(bytes([character])) and (not backslashes or character in _SHORT_ESCAPES):
        yield backslashes + 1
    escape = b"u%04x" % character
    if backslashes and _lower_digits(rest[: len(escape)]) == escape:
        yield backslashes + len(escape)


def _lower_digits(escape: bytes) -> bytes:
    """Return an escape without its backslash, and with its hexadecimal digits in lower case."""
    return escape[:1] + escape[1:].lower()


def _encoding_pattern(character: int) -> bytes:
    """Return a pattern for a character, plain or escaped. Only the hexadecimal digits of an escape ignore case."""
    plain = re.escape(bytes([character]))
    if character == _BACKSLASH:
        plain = rb"\\{1,%d}" % _BACKSLASHES_MAX
    elif character in _SHORT_ESCAPES:
        plain = rb"\\{0,%d}+%b" % (_BACKSLASHES_MAX, plain)
    return rb"(?:\\{1,%d}+u(?i:%04x)|%b)" % (_BACKSLASHES_MAX, character, plain)


def _incomplete_pattern(character: int) -> bytes:
    """Return a pattern for an incomplete escape of the character, possibly empty."""
    digits = b"%04x" % character
    starts = b"|".join(digits[:length] for length in range(3, 0, -1))
    return rb"(?:\\{1,%d}+(?:u(?i:%b)?)?)?" % (_BACKSLASHES_MAX, starts)


class Upstream(msgspec.Struct, frozen=True):
    """A parsed upstream URL and credential.

    path_prefix: the path of the base URL without trailing slashes.
    credential: the name and value of the header.
    key_redactor: replaces the server's key, without the authentication scheme of the header.
    base_url_variable: the name of the environment variable that contains the address, for messages.
    """

    host: str
    port: int
    is_tls: bool
    path_prefix: bytes
    authority: bytes
    credential: tuple[bytes, bytes]
    key_redactor: ValueRedactor
    base_url_variable: str

    def __repr__(self) -> str:
        """Omit the credential."""
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """The host, with the port unless it is the default, for messages."""
        return self.authority.decode()


def parse_upstream(upstream: ModelUpstream, dialect: ModelDialect) -> Upstream:
    """Parse and validate the upstream. Raises ValueError, with a message that never contains the credential."""
    variable = dialect.base_url_variable
    try:
        parts = urlsplit(upstream.base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{variable} has an invalid host or port.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{variable} must be an http:// or https:// address with a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(f"{variable} must have no user, password, query or fragment.")
    if port == 0:
        raise ValueError(f"{variable} has port 0, which is invalid.")
    is_tls = parts.scheme == "https"
    host, port = _normalize_host(host, variable), port or (443 if is_tls else 80)
    prefix = parts.path.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", prefix):
        raise ValueError(f"{variable} has invalid characters in its path.")
    display_host = f"[{host}]" if ":" in host else host
    authority = display_host if port == (443 if is_tls else 80) else f"{display_host}:{port}"
    credential = dialect.credential(upstream)  # raises ValueError for an invalid key
    key_redactor = ValueRedactor(dialect.presented_key(*credential))
    return Upstream(host, port, is_tls, prefix.encode(), authority.encode(), credential, key_redactor, variable)


def _normalize_host(host: str, variable: str) -> str:
    try:
        return host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{variable} has an invalid host name.") from None
