"""A value that stands there plainly is found, whatever else its bytes and those around it may be read as."""

import html
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox.secrets.redactor import SecretRedactor

LIKE_ESCAPES = [
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
BORDERS = [
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
ENDS = [b">>", b"n", b"b", b"41", b"0m", b";", b"'", b'"', b"\\"]
LETTERS = ["a", "0", "n", "b", '"', "'", " ", "é"]


def shown(value: str, before: bytes = b"<<", after: bytes = b">>", redactor: SecretRedactor | None = None) -> bytes:
    redactor, said = redactor or SecretRedactor({"S": value}), before + value.encode() + after
    stream = redactor.stream()
    redacted = b"".join([*(stream.feed(bytes([byte])) for byte in said), stream.flush()])
    assert redacted == redactor.redact(said)
    return redacted


@pytest.mark.parametrize("core", ['0000012"""', "npasswor", "\\x4"])
@pytest.mark.parametrize("escape", LIKE_ESCAPES)
def test_a_value_with_what_looks_like_an_escape_in_it(escape: str, core: str):
    half = len(core) // 2
    written = (core + escape, escape + core, core[:half] + escape + core[half:], core + escape * 3)
    for value in filter(lambda value: len(value) >= 8, written):
        assert b"[REDACTED:S]" in shown(value)


@pytest.mark.parametrize("before", BORDERS)
@pytest.mark.parametrize(
    "value", ["npasswor", "fpasswor", "41234567", "00000     ", "\\b\\b\\b\\b", "[0mabcde", "\\n\\nabcd"]
)
def test_what_stands_before_and_after_takes_nothing_of_a_short_value(value: str, before: bytes):
    redactor = SecretRedactor({"S": value})
    for after in ENDS:
        assert b"[REDACTED:S]" in shown(value, before, after, redactor)


@settings(deadline=None)
@example(pieces=["0000012", '"""', "\\b"], before=b"<<", after=b">>")
@example(pieces=["{\n{{{\n", "\x00", "{"], before=b"", after=b"")
@example(pieces=["&#65;", "ua\n"], before=b'"', after=b"\n")
@given(
    pieces=st.lists(st.sampled_from(LIKE_ESCAPES + LETTERS), min_size=2, max_size=10),
    before=st.sampled_from(BORDERS),
    after=st.sampled_from(ENDS),
)
def test_any_value_is_found_where_it_stands_plainly(pieces: list[str], before: bytes, after: bytes):
    value = "".join(pieces)
    if len(value) >= 8:
        assert b"[REDACTED:S]" in shown(value, before, after)


@pytest.mark.parametrize(
    "value", ['0000012"""\\b', "\\b0\\b1\\b2", "a\x00\x00\x00\x00\x00bc", '%40é""-a', '\\\\\\\\01"x']
)
def test_a_value_of_which_escapes_leave_little_is_found_in_nested_json(value: str):
    redactor, text = SecretRedactor({"S": value}), value
    for _ in range(4):
        text = json.dumps({"text": text})
        assert "[REDACTED:S]" in redactor.redact_text(text)
        inner = json.loads(redactor.redact_text(text))
    assert set(inner) == {"text"}


@pytest.mark.parametrize("value", ['"default"', "'content'", "\\\\default"])
def test_a_word_that_is_too_short_is_not_found_without_what_stands_around_it(value: str):
    redactor = SecretRedactor({"S": value})
    assert b"[REDACTED:S]" in redactor.redact(f"say {value} now".encode())
    for text in (b"the default {", b'{"content":1}'):
        assert redactor.redact(text) == text


SHORT_WITH_ESCAPES = ['%t\\bé="&', "\\0nr&%0/", "a\\f+0'u=", '\\r"##b--', 'r"é\'\\\\b"', "\\0%';&a\\", "it's\\n<b"]


def in_html_of_templates(value: str) -> str:
    return html.escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def in_a_shell(value: str) -> str:
    return value.replace("'", "'\\''")


def in_a_shell_with_double_quotes(value: str) -> str:
    return value.replace("'", "'\"'\"'")


def in_html_around_json(value: str) -> str:
    return html.escape(json.dumps(value))


WRITINGS = [html.escape, in_html_of_templates, in_a_shell, in_a_shell_with_double_quotes, in_html_around_json]


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("value", SHORT_WITH_ESCAPES)
def test_a_value_of_which_escapes_leave_little_is_found_in_html_and_shells(
    value: str, write: Callable[[str], str], depth: int
):
    text = f"<{write(value)}>"
    for _ in range(depth):
        text = json.dumps(text)
    assert "[REDACTED:S]" in SecretRedactor({"S": value}).redact_text(text)


@pytest.mark.parametrize("write", WRITINGS)
@pytest.mark.parametrize("value", SHORT_WITH_ESCAPES)
def test_html_and_shells_with_another_value_stay_as_they_are(value: str, write: Callable[[str], str]):
    redactor = SecretRedactor({"S": value})
    for other in (value.swapcase(), value.translate(str.maketrans("abnrt", "cdmqs"))):
        said = f"<{write(other)}>".encode()
        assert redactor.redact(said) is said
