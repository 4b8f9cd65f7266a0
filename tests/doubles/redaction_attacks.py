"""Encodings of a value that may evade redaction, as Hypothesis strategies."""

import base64
import html
import json
import random
import re
from collections.abc import Callable
from html.entities import html5
from urllib.parse import quote, quote_plus

from hypothesis import strategies as st

VALUES = [
    "ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "npm_nrtbfnrtbf0123456789",
    'p@ss"w\\ord/ +é{}[]',
    "C:\\new\\readme\\table\\u0041\\x41",
    '100%25 %41sure% &amp; it\'s "so"',
    "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nq8WzT4==\n-----END KEY-----",
    "схема пароля 🔑 ключ",
    '{"type": "service", "key": "a\\nb"}',
    "aaaaaaaaaaaa",
    "deadbeefdeadbeef01",
    "tab\there and\r\nthere",
    "pässwörd-x1 %\\6",
]
ALPHABETS = [
    st.characters(codec="ascii", categories=["L", "N"]),
    st.characters(codec="ascii", categories=["L", "N", "P", "S"]),
    st.characters(min_codepoint=0xA0, max_codepoint=0x1F9FF, categories=["L", "N", "S"]),
    st.sampled_from("\\\"/%+&'nrtbfux0123 aé"),
]
# A random value with few different characters could occur in other text by chance.
values = st.sampled_from(VALUES) | st.one_of(
    *(st.text(alphabet, min_size=12, max_size=40) for alphabet in ALPHABETS)
).filter(lambda value: len(set(value.strip())) >= 6 and len(value.strip()) >= 10)

texts = st.sampled_from(
    [
        b"",
        b"x",
        b"\\",
        b" ",
        b"\n",
        b'{"text":"',
        b'"}\n',
        b"\\n",
        b"%",
        b"\x1b[",
        b"\x1b[1m",
        b"'",
        b"&",
        b"user:",
        b"\xe2\x80",
    ]
) | st.binary(max_size=12)

NOISE = [
    "\x1b[0m",
    "\x1b[38;5;12m",
    "\r",
    "\u200b",
    "\ufeff",
    "\x1b]8;;http://x/\x07",
    "\x1b]8;;http://x/\x1b\\",
    "\u2060",
    "\x1b(B",
    "\xad",
    "\x00",
    "\t",
    "\x85",
    "\x9b1m",
    "\x9d0;title\x9c",
    "\u061c",
    "\u3164",
    "\ufe0f",
    "\ufffb",
    "\U000e0041",
    "\U000e01ef",
]


NAMED_CHARACTER_REFERENCES = {
    meaning: name.removesuffix(";") for name, meaning in sorted(html5.items()) if name.endswith(";")
}
"""A named character reference for each string that can be written as one."""

ANY_ESCAPE = re.compile(
    r"(?=(\\+(?:u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|x..|[0-7]{1,3}|.)|%..|&#?\w+;?|'['\"\\]*'))", re.DOTALL
)
"""Matches every escape as group 1, including overlapping escapes."""


def escape_json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)[1:-1]


def escape_json_ascii(value: str) -> str:
    return json.dumps(value)[1:-1].replace("/", "\\/")


def escape_utf16_units(value: str) -> str:
    units = value.encode("utf-16-be")
    return "".join(f"\\u{int.from_bytes(units[i : i + 2]):04X}" for i in range(0, len(units), 2))


def percent_lower(value: str) -> str:
    return "".join(
        letter if letter.isalnum() and letter.isascii() else quote(letter, safe="").lower() for letter in value
    )


def percent_all(value: str) -> str:
    return "".join(f"%{byte:02x}" for byte in value.encode())


def hex_escape(value: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in value.encode())


def octal_escape(value: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in value.encode())


def echo_octal(value: str) -> str:
    return "".join(f"\\0{byte:03o}" for byte in value.encode())


def zero_padded_hex_escape(value: str) -> str:
    return "".join(f"\\x{byte:06x}" for byte in value.encode())


def shell_unicode(value: str) -> str:
    return "".join(f"\\{'u' if ord(letter) < 0x10000 else 'U'}{ord(letter):x}" for letter in value)


def unicode_braces_escape(value: str) -> str:
    return "".join(f"\\u{{{ord(letter):x}}}" for letter in value)


def html_by_name(value: str) -> str:
    return "".join(
        f"&{NAMED_CHARACTER_REFERENCES[letter]};" if letter in NAMED_CHARACTER_REFERENCES else html.escape(letter)
        for letter in value
    )


def html_by_number(value: str) -> str:
    return "".join(f"&#{ord(letter):05};" for letter in value)


def html_by_number_without_semicolon(value: str) -> str:
    return "".join(f"&#x{ord(letter):04x}" for letter in value)


ESCAPES: list[Callable[[str], str]] = [
    escape_json,
    escape_json_ascii,
    escape_utf16_units,
    lambda value: quote(value, safe=""),
    quote_plus,
    percent_lower,
    percent_all,
    html.escape,
    html_by_name,
    html_by_number,
    html_by_number_without_semicolon,
    hex_escape,
    octal_escape,
    echo_octal,
    zero_padded_hex_escape,
    shell_unicode,
    unicode_braces_escape,
    lambda value: value.replace("'", "'\\''"),
    lambda value: value.replace("'", "'\"'\"'"),
]


def wrapped(code: str) -> str:
    return "\n".join(code[start : start + 76] for start in range(0, len(code), 76))


def as_base64(value: str, before: int, url_safe: bool) -> str:
    data = b"u:!"[:before] + value.encode() + b"zz"
    return wrapped((base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode())


@st.composite
def encode_characters(draw: st.DrawFn, value: str) -> list[bytes]:
    """Return a random encoding of the value, as a list with one item per character.

    If the value is converted to base64 or hex first, there is one item per character of that text.
    """
    kind = draw(st.sampled_from(["escaped", "escaped", "base64", "hex", "noise"]))
    letters = list(value)
    if kind == "noise":
        letters = characters_with_noise(value, draw(st.integers(0, 1 << 32)))
    elif kind == "base64":
        text = draw(st.sampled_from([str, escape_json]))(value)
        letters = list(as_base64(text, draw(st.integers(0, 2)), draw(st.booleans())))
    elif kind == "hex":
        letters = list(draw(st.sampled_from([str.lower, str.upper]))(value.encode().hex()))
    for escape in draw(st.lists(st.sampled_from(ESCAPES), max_size=2)):
        letters = list(map(escape, letters))
    for _ in range(draw(st.integers(0, 3))):
        letters = list(map(escape_json if draw(st.booleans()) else escape_json_ascii, letters))
    return [letter.encode() for letter in letters]


def attack(value: str) -> st.SearchStrategy[bytes]:
    """Return the value in a random encoding."""
    return encode_characters(value).map(b"".join)


def with_noise(text: str, seed: int) -> str:
    """Return the text with invisible characters after random characters."""
    return "".join(characters_with_noise(text, seed))


def characters_with_noise(text: str, seed: int) -> list[str]:
    """Return the characters of the text, some with noise. Escapes get none, because noise could change them."""
    rng = random.Random(seed)
    protected = {index for match in ANY_ESCAPE.finditer(text) for index in range(match.start(1), match.end(1) - 1)}
    return [
        letter + (rng.choice(NOISE) if rng.random() < 0.5 and index not in protected else "")
        for index, letter in enumerate(text)
    ]
