"""Terminal strings (titles, links) between the characters of a value, and quotes of a shell, within other encodings."""

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest

from sandbox.secrets.redactor import SecretRedactor

LIKE_ESCAPES = ["0123456789ab", "abefnrtvx41u0041", "p4ssw0rd"]
"""Behind the backslash that ends a string, each of these letters begins an escape."""

STRINGS = [
    "\x1b]0;title\x1b\\",
    "\x1b]8;;http://x/%41?a=1&lt\x1b\\",
    "\x1bPq\x1b\\",
    "\x1b_x\x1b\\",
    "\x9d0;title\x9c",
    "\x1b]8;;http://x/\x07",
]


def as_json(text: str) -> str:
    return json.dumps(text)


def as_json_in_json(text: str) -> str:
    return json.dumps(json.dumps(text))


def as_address(text: str) -> str:
    return quote(text, safe="")


def as_json_in_address(text: str) -> str:
    return quote(json.dumps(text))


def as_address_in_json(text: str) -> str:
    return json.dumps(quote(text))


WRITINGS: list[Callable[[str], str]] = [
    str,
    repr,
    as_json,
    as_json_in_json,
    as_address,
    as_json_in_address,
    as_address_in_json,
]


def in_pieces(redactor: SecretRedactor, data: bytes, size: int) -> bytes:
    stream = redactor.stream()
    pieces = [stream.feed(data[start : start + size]) for start in range(0, len(data), size)]
    return b"".join((*pieces, stream.flush()))


@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("value", LIKE_ESCAPES)
def test_a_terminal_string_between_characters_hides_nothing(value: str, string: str, write: Callable[[str], str]):
    redactor = SecretRedactor({"S": value})
    written = write(f"<{string.join(value)}>").encode()
    redacted = redactor.redact(written)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted) < len(b"<[REDACTED:S]>") + 16
    assert {in_pieces(redactor, written, size) for size in (1, 2, 7, 64)} == {redacted}


@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("string", STRINGS)
def test_a_terminal_string_around_other_text_stays_as_it_is(string: str, write: Callable[[str], str]):
    redactor = SecretRedactor({value: value for value in LIKE_ESCAPES})
    written = write(f"<{string.join('012345678-')}{string}abef{string}p4ss{string}>").encode()
    assert redactor.redact(written) is written
    assert in_pieces(redactor, written, 3) == written


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("joint", ["'\\''", "'\"'\"'"])
@pytest.mark.parametrize("value", ["it's-a-secret", "a'b'c'd'e"])
def test_quotes_of_a_shell_are_undone_in_nested_json(value: str, joint: str, depth: int):
    redactor = SecretRedactor({"S": value})
    text = "x='" + value.replace("'", joint) + "'"
    for _ in range(depth):
        text = json.dumps(text)
    written = text.encode()
    redacted = redactor.redact(written)
    assert redacted.decode() == text[: text.index(value[0])] + "[REDACTED:S]" + text[text.rindex(value[-1]) + 1 :]
    assert {in_pieces(redactor, written, size) for size in (1, 2, 7)} == {redacted}


@pytest.mark.parametrize("depth", range(3))
def test_quotes_of_a_shell_in_other_text_stay(depth: int):
    redactor = SecretRedactor({"S": "it's-a-secret"})
    text = "echo 'it'\"'\"'s-no-secret' 'it'\\''s a'"
    for _ in range(depth):
        text = json.dumps(text)
    written = text.encode()
    assert redactor.redact(written) is written


CUT_SHORT = ["\x1b[12\x18", "\x1b[1;2\x1a", "\x1b]x\x18", "\x1bPq\x1a", "\x1b[1\x1b[0m", "\x9b1\x18", "\x9d0;x\x1a"]
"""A terminal forgets an escape that CAN, SUB or another escape ends, and shows what stands behind."""


@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("string", [*CUT_SHORT, "\x1b[" + "38;2;255;255;255;" * 12 + "1m"])
def test_a_terminal_escape_that_is_cut_short_or_long_hides_nothing(string: str, write: Callable[[str], str]):
    redactor = SecretRedactor({"S": "gHi7_pwssKrd-k"})
    written = write(f"<{string.join('gHi7_pwssKrd-k')}>").encode()
    redacted = redactor.redact(written)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted) < len(b"<[REDACTED:S]>") + 16
    assert {in_pieces(redactor, written, size) for size in (1, 2, 7, 64)} == {redacted}


@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("string", CUT_SHORT)
def test_a_terminal_escape_that_is_cut_short_stays_in_other_text(string: str, write: Callable[[str], str]):
    redactor = SecretRedactor({"S": "gHi7_pwssKrd-k"})
    written = write(f"<{string.join('gHi7_pwssKrd+k')}>").encode()
    assert redactor.redact(written) is written
    assert in_pieces(redactor, written, 3) == written
