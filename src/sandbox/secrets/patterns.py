"""What is searched for: a value in each encoding that is not undone before the search."""

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain, product
from string import whitespace
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from sandbox.secrets.decoders import CODE, EXACT, TEXT, Skeleton, peel
from sandbox.secrets.escapes import find_beginning
from sandbox.secrets.limits import (
    REDACTED_CHARACTERS_MIN,
    REDACTED_LINE_CHARACTERS_MIN,
    REDACTED_NESTING_MAX,
    TWICE_ENCODED_BYTES_MAX,
)

_NEEDLE_BYTES_MIN = 7
"""Shorter ones would not be found (see `search`)."""

_QUOTES = "\"'"

_PEM_MARK = re.compile("-----(BEGIN|END) [A-Z0-9 ]+-----")
"""A line that every key of its kind has."""


class Needle(NamedTuple):
    """A skeleton, and the name of the secret that it belongs to."""

    skeleton: bytes
    name: str

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name}>"


def make_needles(values: Mapping[str, str]) -> Iterator[tuple[Skeleton, list[Needle]]]:
    """The needles by the kind of their skeleton."""
    found: dict[Skeleton, dict[bytes, str]] = {TEXT: {}, CODE: {}, EXACT: {}}
    for name, value in values.items():
        stripped = value.strip()
        whole = stripped if len(stripped) >= REDACTED_CHARACTERS_MIN else value
        usable = set(filter(None, map(_usable, _texts(whole)))) or {TEXT.of(whole.encode("utf-8", "surrogatepass"))}
        found[TEXT].update((text, name) for text in usable if len(text) >= REDACTED_CHARACTERS_MIN)
        found[CODE].update(dict.fromkeys(_codes_of(value), name))
        for text in (whole, *_lines(whole)):
            if not _is_told_by_skeletons(text):
                found[EXACT].update(dict.fromkeys(map(_within_quotes, _nested(text)), name))
    for skeleton, needles in found.items():
        yield skeleton, [Needle(*item) for item in needles.items() if len(item[0]) >= _NEEDLE_BYTES_MIN]


def _usable(text: bytes) -> bytes:
    """The skeleton of a text without the quotes at its ends, if enough is left: in JSON one may end the text."""
    skeleton = TEXT.of(text).strip(_QUOTES.encode())
    return skeleton if len(skeleton) >= REDACTED_CHARACTERS_MIN else b""


def _is_told_by_skeletons(value: str) -> bool:
    """Whether enough of the value is left in every layer of its own, also if a backslash before takes its first letter.

    What looks like an escape may be nothing: of a backslash and a `b` that end a value, no skeleton has anything.
    """
    layers = chain.from_iterable(map(peel, _bytes_of(value)))
    return all(_usable(layer.data) and _usable(layer.data[1:]) for layer in layers)


_SWALLOWERS = (b"\x1b[", b"\x1b", b"\\", b"%", b"&", b"&#", b"&#x")
"""What makes an escape of the beginning of a value that stands behind it."""

_OPEN_BYTES_MAX = 2
"""At the end of a value, of which what stands behind it may make an escape. Without more it would be another value."""


_NUMBERED_AS_WINDOWS_1252 = {
    ord(character): number for number in range(0x80, 0xA0) for character in bytes([number]).decode("cp1252", "ignore")
}
"""In HTML `&#128;` is a euro sign. In XML it is a control, which is how layers read it."""


def _texts(value: str) -> Iterator[bytes]:
    """The value in every layer of its own; host names are shown in lower case; lines may be printed one by one."""
    for data in chain.from_iterable(map(_bytes_of, (value, value.lower(), *_lines(value)))):
        for layer in peel(data):
            yield layer.data
            if layer.data[:1] < b"\x80":  # no escape swallows half a letter
                yield layer.data[1:]
            end = find_beginning(layer.data, len(layer.data))
            if len(layer.data) - end <= _OPEN_BYTES_MAX:
                yield layer.data[:end]
            yield layer.data.replace(b"\\", b"")  # something invisible may stand between a backslash and its letter
        for before in _SWALLOWERS:
            yield from (layer.data for layer in peel(before + data)[1:])
    if (numbered := value.translate(_NUMBERED_AS_WINDOWS_1252)) != value:
        yield numbered.encode("utf-8", "surrogatepass")


def _bytes_of(text: str) -> set[bytes]:
    """In UTF-8, and with one byte for each letter of Latin-1, for which JavaScript and Python write `\\xe4`."""
    utf_8 = text.encode("utf-8", "surrogatepass")
    short = (letter.encode("latin-1" if letter < "\u0100" else "utf-8", "surrogatepass") for letter in text)
    return {utf_8} if text.isascii() else {utf_8, b"".join(short)}


def _lines(value: str) -> Iterator[str]:
    lines = value.splitlines()
    if len(lines) > 1:
        for line in map(_unquoted, lines):
            if len(line) >= REDACTED_LINE_CHARACTERS_MIN and not _PEM_MARK.fullmatch(line):
                yield line


def _unquoted(value: str) -> str:
    return value.strip(_QUOTES + whitespace)


def _forms(value: str) -> set[bytes]:
    """What people encode: the value itself, or what stands for it in JSON or in an address."""
    address = quote_from_bytes(value.encode("utf-8", "surrogatepass"), safe="")
    return _bytes_of(value) | {
        json.dumps(value)[1:-1].encode(),
        json.dumps(value, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass"),
        address.encode(),
        address.replace("%20", "+").encode(),
    }


def _nested(value: str) -> set[bytes]:
    """Its forms, those for HTML and shells, also of its JSON, and what JSON within JSON makes of them."""
    forms = _forms(value)
    plain = {value}
    if len(value) <= TWICE_ENCODED_BYTES_MAX:
        plain |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    written = plain.union(*map(_with_quotes_escaped, plain))
    for form, is_ascii in product(written, (True, False)):
        text = form
        forms.add(text.encode("utf-8", "surrogatepass"))
        for _ in range(REDACTED_NESTING_MAX):
            text = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
            if len(text) > TWICE_ENCODED_BYTES_MAX:
                break
            forms.add(text.encode("utf-8", "surrogatepass"))
    return forms


_QUOTES_IN_HTML = tuple(product(("&quot;", "&#34;", '"'), ("&#x27;", "&#39;", "&#039;", "&apos;", "'")))
_QUOTES_IN_SHELLS = ("'\\''", "'\"'\"'")


def _with_quotes_escaped(value: str) -> Iterator[str]:
    """As template engines escape it for HTML, and as it stands within the quotes of a shell."""
    text = html.escape(value, quote=False)
    for double, single in _QUOTES_IN_HTML:
        yield text.replace('"', double).replace("'", single)
    for quote in _QUOTES_IN_SHELLS:
        yield value.replace("'", quote)


def _within_quotes(form: bytes) -> bytes:
    """Without backslashes and quotes at its ends, of which JSON may have made or need one half, if enough is left."""
    rest = form.strip(_QUOTES.encode() + b"\\")
    return rest if len(rest) >= REDACTED_CHARACTERS_MIN else form


def _codes_of(value: str) -> Iterator[bytes]:
    for form in _forms(value) | _forms(value.strip()) | _forms(_unquoted(value)):
        for code in _encodings(form):
            yield from _as_found(code)
        if len(form) <= TWICE_ENCODED_BYTES_MAX:
            for code in _encodings(form).union(_wrapped(form)):
                for twice in _encodings(code):
                    yield from _as_found(twice)


def _as_found(code: bytes) -> Iterator[bytes]:
    """What stands before it may make an escape of its first letter."""
    yield CODE.of(code)
    yield CODE.of(code[1:])


def _encodings(data: bytes) -> set[bytes]:
    codes = {data.hex().encode(), data.hex().upper().encode()}
    for shift in range(3):
        code = _base64_core(data, shift)
        codes |= {code, code.translate(bytes.maketrans(b"+/", b"-_"))}
    return codes


def _wrapped(data: bytes) -> Iterator[bytes]:
    """Lines as `base64`, MIME, `openssl base64` and `xxd -p` make them, where they have nothing before the data."""
    core = _base64_core(data, 0)
    for code, width, end in (
        (core, 76, b"\n"),
        (core, 76, b"\r\n"),
        (core, 64, b"\n"),
        (data.hex().encode(), 60, b"\n"),
    ):
        yield end.join(code[at : at + width] for at in range(0, len(code), width))


def _base64_core(data: bytes, shift: int) -> bytes:
    """The digits that depend on nothing else, if `shift` bytes (modulo 3) stand before the data."""
    digits = base64.b64encode(bytes(shift) + data)
    return digits[(0, 2, 3)[shift] : (shift + len(data)) * 8 // 6]
