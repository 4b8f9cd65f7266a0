"""A plain value is found even if its bytes or the surrounding bytes look like an encoding."""

import html
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from doubles.redaction_attacks import ESCAPES
from sandbox.secrets.redaction.escape_decoding import (
    find_escapes,
    find_isolated_escapes,
    find_variable_length_escapes,
    may_contain_consecutive_escapes,
    may_contain_variable_length_escapes,
)
from sandbox.secrets.redaction.escape_layers import decode_layers, decoded_forms
from sandbox.secrets.redaction.redactor import SecretRedactor

ESCAPE_LIKE = [
    *("\\b", "\\n", "\\t", "\\r", "\\f", "\\e", "\\6", "\\033", "\\x41", "\\u0041", "\\u{41}", "\\U00000041", "\\\\"),
    *(
        "\\u001b[0m",
        "\\ud83d\\ude00",
        "%41",
        "%4",
        "&amp;",
        "&#65;",
        "&#x41;",
        "'\\''",
        "'\"'\"'",
        "\x1b[0m",
        "\x1b]0;",
    ),
    *("\x1b", "\x00", "\r", "\n", "\u200b", "\xad", "+", "\\"),
]
PREFIXES = [
    b"<<",
    b"\\",
    b"\\\\",
    b"\\u00",
    b"%",
    b"&",
    b"&#",
    b"'",
    b'"',
    b"\x1b",
    b"\x1b[",
    b"\xe2\x80",
    b"\xc2",
    b"n",
]
SUFFIXES = [b">>", b"n", b"b", b"41", b"0m", b";", b"'", b'"', b"\\"]
LETTERS = ["a", "0", "n", "b", '"', "'", " ", "é"]


def redact_in_context(
    value: str, before: bytes = b"<<", after: bytes = b">>", redactor: SecretRedactor | None = None
) -> bytes:
    redactor, data = redactor or SecretRedactor({"S": value}), before + value.encode() + after
    stream = redactor.stream()
    redacted = b"".join([*(stream.feed(bytes([byte])) for byte in data), stream.flush()])
    assert redacted == redactor.redact(data)
    return redacted


@pytest.mark.parametrize("middle", ['0000012"""', "npasswor", "\\x4"])
@pytest.mark.parametrize("escape", ESCAPE_LIKE)
def test_value_that_contains_an_escape_is_found(escape: str, middle: str):
    half = len(middle) // 2
    candidates = (middle + escape, escape + middle, middle[:half] + escape + middle[half:], middle + escape * 3)
    for value in filter(lambda value: len(value) >= 8, candidates):
        assert b"[REDACTED:S]" in redact_in_context(value)


@pytest.mark.parametrize("before", PREFIXES)
@pytest.mark.parametrize(
    "value", ["npasswor", "fpasswor", "41234567", "00000     ", "\\b\\b\\b\\b", "[0mabcde", "\\n\\nabcd"]
)
def test_context_does_not_hide_a_short_value(value: str, before: bytes):
    redactor = SecretRedactor({"S": value})
    for after in SUFFIXES:
        assert b"[REDACTED:S]" in redact_in_context(value, before, after, redactor)


@settings(deadline=None)
@example(pieces=["0000012", '"""', "\\b"], before=b"<<", after=b">>")
@example(pieces=["{\n{{{\n", "\x00", "{"], before=b"", after=b"")
@example(pieces=["&#65;", "ua\n"], before=b'"', after=b"\n")
@given(
    pieces=st.lists(st.sampled_from(ESCAPE_LIKE + LETTERS), min_size=2, max_size=10),
    before=st.sampled_from(PREFIXES),
    after=st.sampled_from(SUFFIXES),
)
def test_any_plain_value_is_found(pieces: list[str], before: bytes, after: bytes):
    value = "".join(pieces)
    if len(value) >= 8:
        assert b"[REDACTED:S]" in redact_in_context(value, before, after)


@pytest.mark.parametrize(
    "value", ['0000012"""\\b', "\\b0\\b1\\b2", "a\x00\x00\x00\x00\x00bc", '%40é""-a', '\\\\\\\\01"x']
)
def test_value_that_mostly_consists_of_escapes_is_found_in_nested_json(value: str):
    redactor, text = SecretRedactor({"S": value}), value
    for _ in range(4):
        text = json.dumps({"text": text})
        assert "[REDACTED:S]" in redactor.redact_text(text)
        inner = json.loads(redactor.redact_text(text))
    assert set(inner) == {"text"}


@pytest.mark.parametrize("value", ['"default"', "'content'", "\\\\default"])
def test_short_value_without_its_quotes_is_not_redacted(value: str):
    redactor = SecretRedactor({"S": value})
    assert b"[REDACTED:S]" in redactor.redact(f"say {value} now".encode())
    for text in (b"the default {", b'{"content":1}'):
        assert redactor.redact(text) == text


SHORT_WITH_ESCAPES = ['%t\\bé="&', "\\0nr&%0/", "a\\f+0'u=", '\\r"##b--', 'r"é\'\\\\b"', "\\0%';&a\\", "it's\\n<b"]


def go_html_escape(value: str) -> str:
    return html.escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def single_quoted(value: str) -> str:
    return value.replace("'", "'\\''")


def mixed_quoted(value: str) -> str:
    return value.replace("'", "'\"'\"'")


def html_of_json(value: str) -> str:
    return html.escape(json.dumps(value))


ENCODINGS = [html.escape, go_html_escape, single_quoted, mixed_quoted, html_of_json]


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("value", SHORT_WITH_ESCAPES)
def test_value_that_mostly_consists_of_escapes_is_found_in_html_and_shell_text(
    value: str, encode: Callable[[str], str], depth: int
):
    text = f"<{encode(value)}>"
    for _ in range(depth):
        text = json.dumps(text)
    assert "[REDACTED:S]" in SecretRedactor({"S": value}).redact_text(text)


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("value", SHORT_WITH_ESCAPES)
def test_html_and_shell_text_with_a_different_value_is_unchanged(value: str, encode: Callable[[str], str]):
    redactor = SecretRedactor({"S": value})
    for other in (value.swapcase(), value.translate(str.maketrans("abnrt", "cdmqs"))):
        data = f"<{encode(other)}>".encode()
        assert redactor.redact(data) is data


INCOMPLETE_ESCAPES = [
    *("\\x2:", "\\u12:", "\\U12:", "\\7:", "\\60123:", "\\x0041:", "\\ud83d:"),
    *("&#9:", "&#x9:", "&lt:", "%4:"),
]
"""Text that only some decoders change, or that is the start of an escape."""

FILLINGS = ["\xad", "\u200b", "\ufe0f", "\x1b[1m", "\x1b]8;;http://x/\x1b\\", "\x1b(B", "\x85"]


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("text", INCOMPLETE_ESCAPES)
def test_value_that_looks_like_an_escape_is_found_between_encoded_invisible_characters(
    text: str, escape: Callable[[str], str]
):
    """The encoding of the whole text selects a decoder that also changes the value."""
    value, other = f"g00000001{text}k", f"g00000001{text}j"
    redactor = SecretRedactor({"S": value})
    for filling in FILLINGS:
        encoded = "".join(map(escape, [*(letter + filling for letter in value[:9]), *value[9:]]))
        assert redactor.redact_text(f"<{encoded}>") == "<[REDACTED:S]>", filling
        similar = "".join(map(escape, [*(letter + filling for letter in other[:9]), *other[9:]]))
        assert redactor.redact_text(similar) is similar


def test_value_that_looks_like_an_escape_is_found_in_a_stream_of_octal_escapes():
    value = "00000001\\x2:"
    spaced = "00\x1b(B00\xad0\x1b]8;;http://x/\x1b\\01\\x2:"
    data = b"<<" + b"".join(b"\\0%03o" % byte for byte in spaced.encode()) + b">>"
    redactor = SecretRedactor({"S": value})
    assert redactor.redact(data) == b"<<[REDACTED:S]>>"
    for cut in range(1, len(data)):
        stream = redactor.stream()
        assert stream.feed(data[:cut]) + stream.feed(data[cut:]) + stream.flush() == b"<<[REDACTED:S]>>"


ESCAPE_CHARACTERS = "\\\\\\&&#%xuU{}'\";0123456789abcdefABCDEF "
ESCAPE_PARTS = ["\\ud83d", "\\ude00", "&lt", "&frac12", "&amp;", "\u200b", "\x00", "\x1b[", "é"]
texts_with_escapes = st.lists(st.sampled_from([*ESCAPE_CHARACTERS, *ESCAPE_PARTS]), max_size=14).map(
    lambda pieces: "".join(pieces).encode()
)


@settings(max_examples=300, deadline=None)
@given(texts_with_escapes)
def test_skipping_an_alternative_that_a_quick_check_excludes_does_not_change_the_escapes(data: bytes):
    """If a check missed a difference, other text in the stream would decide whether an escape is decoded."""
    if not may_contain_variable_length_escapes(data):
        assert list(find_variable_length_escapes(data)) == list(find_escapes(data))
    if not may_contain_consecutive_escapes(data):
        assert list(find_isolated_escapes(data)) == list(find_escapes(data))


@settings(max_examples=200, deadline=None)
@given(texts_with_escapes)
def test_forms_of_a_value_include_all_its_layers(data: bytes):
    forms = decoded_forms(data)
    assert forms[0] == data
    assert {layer.data for layer in decode_layers(data)} <= set(forms)
