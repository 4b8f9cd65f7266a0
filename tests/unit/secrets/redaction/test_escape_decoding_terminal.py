"""A value, plain or encoded, is found even if terminal strings (titles, links) or shell quotes interrupt it."""

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest

from sandbox.secrets.redaction.redactor import SecretRedactor

ESCAPE_LIKE = ["0123456789ab", "abefnrtvx41u0041", "p4ssw0rd"]
"""Values that look like escapes after the backslash that ends a terminal string."""

CONTROL_STRINGS = [
    "\x1b]0;title\x1b\\",
    "\x1b]8;;http://x/%41?a=1&lt\x1b\\",
    "\x1bPq\x1b\\",
    "\x1b_x\x1b\\",
    "\x9d0;title\x9c",
    "\x1b]8;;http://x/\x07",
]


def json_encoded(text: str) -> str:
    return json.dumps(text)


def json_in_json(text: str) -> str:
    return json.dumps(json.dumps(text))


def percent_encoded(text: str) -> str:
    return quote(text, safe="")


def percent_encoded_json(text: str) -> str:
    return quote(json.dumps(text))


def json_of_percent_encoded(text: str) -> str:
    return json.dumps(quote(text))


ENCODINGS: list[Callable[[str], str]] = [
    str,
    repr,
    json_encoded,
    json_in_json,
    percent_encoded,
    percent_encoded_json,
    json_of_percent_encoded,
]


def redact_in_chunks(redactor: SecretRedactor, data: bytes, size: int) -> bytes:
    stream = redactor.stream()
    redacted = [stream.feed(data[start : start + size]) for start in range(0, len(data), size)]
    return b"".join((*redacted, stream.flush()))


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("string", CONTROL_STRINGS)
@pytest.mark.parametrize("value", ESCAPE_LIKE)
def test_terminal_strings_inside_a_value_do_not_hide_it(value: str, string: str, encode: Callable[[str], str]):
    redactor = SecretRedactor({"S": value})
    encoded = encode(f"<{string.join(value)}>").encode()
    redacted = redactor.redact(encoded)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted) < len(b"<[REDACTED:S]>") + 16
    assert {redact_in_chunks(redactor, encoded, size) for size in (1, 2, 7, 64)} == {redacted}


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("string", CONTROL_STRINGS)
def test_terminal_strings_in_text_without_the_value_are_unchanged(string: str, encode: Callable[[str], str]):
    redactor = SecretRedactor({value: value for value in ESCAPE_LIKE})
    encoded = encode(f"<{string.join('012345678-')}{string}abef{string}p4ss{string}>").encode()
    assert redactor.redact(encoded) is encoded
    assert redact_in_chunks(redactor, encoded, 3) == encoded


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("quoted_quote", ["'\\''", "'\"'\"'"])
@pytest.mark.parametrize("value", ["it's-a-secret", "a'b'c'd'e"])
def test_shell_quotes_are_decoded_in_nested_json(value: str, quoted_quote: str, depth: int):
    redactor = SecretRedactor({"S": value})
    text = "x='" + value.replace("'", quoted_quote) + "'"
    for _ in range(depth):
        text = json.dumps(text)
    encoded = text.encode()
    redacted = redactor.redact(encoded)
    assert redacted.decode() == text[: text.index(value[0])] + "[REDACTED:S]" + text[text.rindex(value[-1]) + 1 :]
    assert {redact_in_chunks(redactor, encoded, size) for size in (1, 2, 7)} == {redacted}


def in_single_quotes(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def in_double_quotes_escaping_both(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"') + '"'


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize(
    "encode", [repr, in_single_quotes, in_double_quotes_escaping_both, lambda text: repr(in_single_quotes(text))]
)
@pytest.mark.parametrize("quoted_quote", ["'\\''", "'\"'\"'"])
@pytest.mark.parametrize("value", ["it's-a-\"secret", "a'b'c'd'e-\"-f", "say '''it''' now"])
def test_shell_quotes_are_decoded_in_string_literals(
    value: str, quoted_quote: str, encode: Callable[[str], str], depth: int
):
    redactor = SecretRedactor({"S": value})
    text = encode("run '" + value.replace("'", quoted_quote) + "' end")
    for _ in range(depth):
        text = json.dumps(text)
    redacted = redactor.redact(text.encode())
    rest = redacted.decode().partition("run ")[2].partition(" end")[0]
    assert rest.strip("\\'\"") == "[REDACTED:S]"
    assert {redact_in_chunks(redactor, text.encode(), size) for size in (1, 2, 7)} == {redacted}


@pytest.mark.parametrize("encode", [repr, in_single_quotes, in_double_quotes_escaping_both])
@pytest.mark.parametrize("value", ["a'''b'''c'd", "it''s-a-secret", "'''''''''"])
def test_quotes_in_nested_string_literals_are_decoded_separately(value: str, encode: Callable[[str], str]):
    redacted = SecretRedactor({"S": value}).redact_text(encode(encode(f"run {value} end")))
    assert redacted.partition("run ")[2].partition(" end")[0].strip("\\'\"") == "[REDACTED:S]"


@pytest.mark.parametrize("depth", range(3))
def test_shell_quotes_in_text_without_the_value_are_unchanged(depth: int):
    redactor = SecretRedactor({"S": "it's-a-secret"})
    text = "echo 'it'\"'\"'s-no-secret' 'it'\\''s a'"
    text += repr(text)
    for _ in range(depth):
        text = json.dumps(text)
    encoded = text.encode()
    assert redactor.redact(encoded) is encoded


ABORTED_ESCAPES = [
    "\x1b[12\x18",
    "\x1b[1;2\x1a",
    "\x1b]x\x18",
    "\x1bPq\x1a",
    "\x1b[1\x1b[0m",
    "\x9b1\x18",
    "\x9d0;x\x1a",
]
"""A terminal discards an escape that is aborted by CAN, SUB or another escape, and prints the text that follows."""


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("string", [*ABORTED_ESCAPES, "\x1b[" + "38;2;255;255;255;" * 12 + "1m"])
def test_aborted_or_long_terminal_escapes_do_not_hide_a_value(string: str, encode: Callable[[str], str]):
    redactor = SecretRedactor({"S": "gHi7_pwssKrd-k"})
    encoded = encode(f"<{string.join('gHi7_pwssKrd-k')}>").encode()
    redacted = redactor.redact(encoded)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted) < len(b"<[REDACTED:S]>") + 16
    assert {redact_in_chunks(redactor, encoded, size) for size in (1, 2, 7, 64)} == {redacted}


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("string", ABORTED_ESCAPES)
def test_aborted_terminal_escapes_in_text_without_the_value_are_unchanged(string: str, encode: Callable[[str], str]):
    redactor = SecretRedactor({"S": "gHi7_pwssKrd-k"})
    encoded = encode(f"<{string.join('gHi7_pwssKrd+k')}>").encode()
    assert redactor.redact(encoded) is encoded
    assert redact_in_chunks(redactor, encoded, 3) == encoded
