"""Builds the search patterns: each value in every encoding that is not decoded before the search.

Normalizers drop bytes and unify equivalent ones, in the patterns and in the searched bytes.
"""

import base64
import html
import json
import re
from array import array
from collections.abc import Iterator, Mapping
from itertools import chain, compress, product
from string import whitespace
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from sandbox.secrets.limits import (
    NESTED_JSON_LEVELS_MAX,
    REDACTED_LINE_CHARACTERS_MIN,
    REDACTED_VALUE_CHARACTERS_MIN,
    TWICE_ENCODED_VALUE_BYTES_MAX,
)
from sandbox.secrets.redaction.escape_decoding import find_partial_escape
from sandbox.secrets.redaction.escape_layers import decoded_forms

_BLANK = b"\t\n\x0b\x0c\r "
_CONTROLS = bytes(range(32)) + b"\x7f"
_ESCAPE_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
"""C1 controls that start a terminal escape, as an escape character does."""


class Normalizer:
    """A way of normalizing bytes before the search.

    `escapes` are replaced first, by text of the same length. `equivalents` are then unified, and `dropped` bytes
    removed.
    """

    def __init__(self, escapes: dict[bytes, bytes], equivalents: tuple[bytes, bytes], dropped: bytes) -> None:
        self._escapes = escapes
        self._table = bytes.maketrans(*equivalents)
        self._dropped = dropped
        self._keep_table = bytes(byte not in dropped for byte in range(256))

    def normalize(self, data: bytes) -> bytes:
        """Return the normalized bytes."""
        return self._replace_escapes(data).translate(self._table, self._dropped)

    def positions(self, data: bytes) -> array[int]:
        """Return the position in `data` of each byte of its normalized form."""
        return array("L", compress(range(len(data)), self._replace_escapes(data).translate(self._keep_table)))

    def _replace_escapes(self, data: bytes) -> bytes:
        if b"\\" in data:
            for escape, replacement in self._escapes.items():
                data = data.replace(escape, replacement)
        if self._escapes and b"\xc2" in data:
            data = _ESCAPE_INTRODUCER.sub(b"\0\0", data)
        return data


TEXT_NORMALIZER = Normalizer(
    {rb"\n": b"\0\n", rb"\t": b"\0\0", rb"\r": b"\0\0", rb"\b": b"\0\0", rb"\f": b"\0\0"},
    (b"+", b" "),
    bytes(set(_CONTROLS) - set(b"\n")) + b"\\",
)
"""Plain text: drops controls except line feeds; a plus counts as a space, as in the data of HTML forms."""

ENCODED_NORMALIZER = Normalizer(
    {rb"\n": b"\0\0", rb"\t": b"\0\0", rb"\r": b"\0\0"},
    (b"-_", b"+/"),
    bytes(set(_CONTROLS) | set(_BLANK)) + b"\\",
)
"""Base64 and hex: drops line breaks and blanks, and unifies both base64 alphabets."""

EXACT_NORMALIZER = Normalizer({}, (b"", b""), b"")
"""Keeps every byte, for values that consist of bytes that the other normalizers drop."""


_PATTERN_BYTES_MIN = 7
"""Shorter patterns would not be found (see `MultiPatternSearch`)."""

_QUOTES = "\"'"

_PEM_BOUNDARY = re.compile("-----(BEGIN|END) [A-Z0-9 ]+-----")
"""Matches the first and the last line of a PEM file, which are the same in all keys of one kind."""


class SecretPattern(NamedTuple):
    """A normalized pattern and the name of its secret. Its repr omits the pattern."""

    normalized: bytes
    name: str

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name}>"


def make_patterns(values: Mapping[str, str]) -> Iterator[tuple[Normalizer, list[SecretPattern]]]:
    """Yield the patterns for each normalizer."""
    names_by_pattern: dict[Normalizer, dict[bytes, str]] = {
        TEXT_NORMALIZER: {},
        ENCODED_NORMALIZER: {},
        EXACT_NORMALIZER: {},
    }
    for name, value in values.items():
        stripped = value.strip()
        whole = stripped if len(stripped) >= REDACTED_VALUE_CHARACTERS_MIN else value
        usable = set(filter(None, map(_usable_pattern, _text_forms(whole)))) or {
            TEXT_NORMALIZER.normalize(whole.encode("utf-8", "surrogatepass"))
        }
        names_by_pattern[TEXT_NORMALIZER].update(
            (text, name) for text in usable if len(text) >= REDACTED_VALUE_CHARACTERS_MIN
        )
        names_by_pattern[ENCODED_NORMALIZER].update(dict.fromkeys(_encoded_forms(value), name))
        for text in (whole, *_long_lines(whole)):
            if not _survives_normalization(text):
                names_by_pattern[EXACT_NORMALIZER].update(
                    dict.fromkeys(map(_strip_quotes_and_backslashes, _nested_forms(text)), name)
                )
    for normalizer, patterns in names_by_pattern.items():
        yield normalizer, [SecretPattern(*item) for item in patterns.items() if len(item[0]) >= _PATTERN_BYTES_MIN]


def may_contain_escapes(value: str) -> bool:
    """Return whether a part of the value looks like an escape or an invisible character."""
    return any(len(decoded_forms(data)) > 1 for data in _byte_encodings(value))


def _usable_pattern(text: bytes) -> bytes:
    """Return the normalized text without quotes at its ends, which may delimit JSON strings; empty if too short."""
    normalized = TEXT_NORMALIZER.normalize(text).strip(_QUOTES.encode())
    return normalized if len(normalized) >= REDACTED_VALUE_CHARACTERS_MIN else b""


def _survives_normalization(value: str) -> bool:
    """Return whether normalization leaves enough of the value in each layer, even without the value's first character.

    A backslash before the value may consume the value's first character. Text that looks like an escape may decode to
    nothing. For example, a backslash and a `b` at the end of a value are in no normalized form.
    """
    forms = chain.from_iterable(map(decoded_forms, _byte_encodings(value)))
    return all(_usable_pattern(form) and _usable_pattern(form[1:]) for form in forms)


_ESCAPE_PREFIXES = (b"\x1b[", b"\x1b", b"\\", b"%", b"&", b"&#", b"&#x")
"""Bytes that, before a value, turn its first bytes into an escape."""

_OPEN_ESCAPE_BYTES_MAX = 2
"""Maximum length of an incomplete escape at the end of a value, which following bytes may complete.

A pattern that omitted more of the value would match other values.
"""


_WINDOWS_1252_CODES = {
    ord(character): number for number in range(0x80, 0xA0) for character in bytes([number]).decode("cp1252", "ignore")
}
"""In HTML, `&#128;` is a euro sign. In XML, it is a control character; the layers decode it as in XML."""


def _text_forms(value: str) -> Iterator[bytes]:
    """Yield all forms of the value, of its lower-case form (as host names are shown), and of its long lines."""
    for data in chain.from_iterable(map(_byte_encodings, (value, value.lower(), *_long_lines(value)))):
        for form in decoded_forms(data):
            yield form
            if form[:1] < b"\x80":  # no escape consumes a part of a character
                yield form[1:]
            end = find_partial_escape(form, len(form))
            if len(form) - end <= _OPEN_ESCAPE_BYTES_MAX:
                yield form[:end]
            # An invisible sequence may separate a backslash from the character that it escapes.
            yield form.replace(b"\\", b"")
        for before in _ESCAPE_PREFIXES:
            yield from decoded_forms(before + data)[1:]
    if (numbered := value.translate(_WINDOWS_1252_CODES)) != value:
        yield numbered.encode("utf-8", "surrogatepass")


def _byte_encodings(text: str) -> set[bytes]:
    r"""Encode a string in UTF-8, and with one byte per Latin-1 character, which JavaScript and Python write `\xe4`."""
    utf_8 = text.encode("utf-8", "surrogatepass")
    short = (letter.encode("latin-1" if letter < "\u0100" else "utf-8", "surrogatepass") for letter in text)
    return {utf_8} if text.isascii() else {utf_8, b"".join(short)}


def _long_lines(value: str) -> Iterator[str]:
    lines = value.splitlines()
    if len(lines) > 1:
        for line in map(_strip_quotes, lines):
            if len(line) >= REDACTED_LINE_CHARACTERS_MIN and not _PEM_BOUNDARY.fullmatch(line):
                yield line


def _strip_quotes(value: str) -> str:
    return value.strip(_QUOTES + whitespace)


_UNESCAPED_IN_ADDRESSES = ("", "/", "!'()*~", "!'()*~;/?:@&=+$,#")
"""Characters that Python's `quote_plus` and `quote`, and JavaScript's `encodeURIComponent` and `encodeURI`, keep."""

_JSON_ESCAPES = (
    str.maketrans({"/": "\\/"}),
    str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}),
)
"""Additional escapes in the JSON of PHP and Go."""


def _escaped_forms(value: str) -> set[bytes]:
    """Return the strings that are commonly encoded: the value, and its escaped forms in JSON and URLs."""
    data = value.encode("utf-8", "surrogatepass")
    addresses = [quote_from_bytes(data, safe=safe) for safe in _UNESCAPED_IN_ADDRESSES]
    texts = [json.dumps(value, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)]
    texts += [text.translate(escapes) for text, escapes in product(texts, _JSON_ESCAPES)]
    texts += [*addresses, addresses[0].replace("%20", "+")]
    return _byte_encodings(value) | {text.encode("utf-8", "surrogatepass") for text in texts}


def _nested_forms(value: str) -> set[bytes]:
    """Return the escaped forms of the value for JSON, URLs, HTML and shells, combined and in nested JSON."""
    forms = _escaped_forms(value)
    plain = {value}
    if len(value) <= TWICE_ENCODED_VALUE_BYTES_MAX:
        plain |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    written = plain.union(*map(_escape_quotes, plain))
    for form, is_ascii in product(written, (True, False)):
        text = form
        forms.add(text.encode("utf-8", "surrogatepass"))
        for _ in range(NESTED_JSON_LEVELS_MAX):
            text = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
            if len(text) > TWICE_ENCODED_VALUE_BYTES_MAX:
                break
            forms.add(text.encode("utf-8", "surrogatepass"))
    return forms


_QUOTES_IN_HTML = tuple(product(("&quot;", "&#34;", '"'), ("&#x27;", "&#39;", "&#039;", "&apos;", "'")))
_QUOTES_IN_SHELLS = ("'\\''", "'\"'\"'")


def _escape_quotes(value: str) -> Iterator[str]:
    """Yield the value as template engines escape it for HTML and as shells quote it."""
    text = html.escape(value, quote=False)
    for double, single in _QUOTES_IN_HTML:
        yield text.replace('"', double).replace("'", single)
    for quote in _QUOTES_IN_SHELLS:
        yield value.replace("'", quote)


def _strip_quotes_and_backslashes(form: bytes) -> bytes:
    """Strip backslashes and quotes at the ends, which JSON may add or consume, if enough is left."""
    rest = form.strip(_QUOTES.encode() + b"\\")
    return rest if len(rest) >= REDACTED_VALUE_CHARACTERS_MIN else form


def _encoded_forms(value: str) -> Iterator[bytes]:
    for form in _escaped_forms(value) | _escaped_forms(value.strip()) | _escaped_forms(_strip_quotes(value)):
        for code in _encodings(form):
            yield from _normalized_encodings(code)
        if len(form) <= TWICE_ENCODED_VALUE_BYTES_MAX:
            for code in _encodings(form).union(_wrapped(form)):
                for twice in _encodings(code):
                    yield from _normalized_encodings(twice)


def _normalized_encodings(code: bytes) -> Iterator[bytes]:
    """Yield the normalized base64 or hex with and without its first character, which a preceding escape may consume."""
    yield ENCODED_NORMALIZER.normalize(code)
    yield ENCODED_NORMALIZER.normalize(code[1:])


def _encodings(data: bytes) -> set[bytes]:
    codes = {data.hex().encode(), data.hex().upper().encode()}
    for shift in range(3):
        code = _base64_inner_digits(data, shift)
        codes |= {code, code.translate(bytes.maketrans(b"+/", b"-_"))}
    return codes


def _wrapped(data: bytes) -> Iterator[bytes]:
    """Yield lines as `base64`, MIME, `openssl base64` and `xxd -p` write them, without line prefixes."""
    core = _base64_inner_digits(data, 0)
    for code, width, end in (
        (core, 76, b"\n"),
        (core, 76, b"\r\n"),
        (core, 64, b"\n"),
        (data.hex().encode(), 60, b"\n"),
    ):
        yield end.join(code[at : at + width] for at in range(0, len(code), width))


def _base64_inner_digits(data: bytes, shift: int) -> bytes:
    """Return the base64 digits that depend only on `data`, if `shift` bytes (modulo 3) precede it."""
    digits = base64.b64encode(bytes(shift) + data)
    return digits[(0, 2, 3)[shift] : (shift + len(data)) * 8 // 6]
