"""A value is found even if there are invisible characters between its characters."""

import base64
import json
import sys
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest

from doubles.redaction_attacks import html_by_name, html_by_number
from sandbox.model.display_text import INVISIBLE
from sandbox.secrets.redaction.redactor import SecretRedactor

VALUE = "gH7_pässwörd-к"
INVISIBLES = [code for code in range(sys.maxunicode + 1) if INVISIBLE.match(chr(code)) and chr(code) != "\n"]
"""All invisible characters except the line feed, which ends a line."""


@pytest.fixture(scope="module")
def redactor() -> SecretRedactor:
    return SecretRedactor({"S": VALUE})


def interleave(filling: str) -> str:
    return filling.join(VALUE)


def json_escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def plain(text: str) -> str:
    return text


def percent_encoded(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def json_in_html(text: str) -> str:
    return html_by_name(json_escaped(text))


def html_in_json(text: str) -> str:
    return json_escaped(html_by_number(text))


def json_in_json(text: str) -> str:
    return json_escaped(json_escaped(text))


ENCODINGS: list[Callable[[str], str]] = [
    plain,
    json_escaped,
    json_in_json,
    percent_encoded,
    html_by_name,
    html_by_number,
    html_in_json,
    json_in_html,
]


@pytest.mark.parametrize("encode", ENCODINGS)
def test_value_with_any_encoded_invisible_character_is_redacted(redactor: SecretRedactor, encode: Callable[[str], str]):
    """Each character is on a separate line. Most encodings are tested with only every seventh character."""
    step = 1 if encode is plain else 7
    codes_tested = INVISIBLES[::step]
    for codes in (codes_tested[start : start + 200] for start in range(0, len(codes_tested), 200)):
        text = "\n".join(f"<{encode(interleave(chr(code)))}>" for code in codes)
        redacted = redactor.redact_text(text).split("\n")
        assert [hex(code) for code, line in zip(codes, redacted, strict=True) if line != "<[REDACTED:S]>"] == []


@pytest.mark.parametrize("encode", ENCODINGS)
def test_value_with_a_run_of_invisible_characters_is_redacted(redactor: SecretRedactor, encode: Callable[[str], str]):
    for run in ("\u061c\u3164\ufe0f\t\x85", "\U000e0041" * 40, "\ufff9\ufffb", "\x9d0;title\x9c", "\x9b1m"):
        assert redactor.redact_text(f"<{encode(VALUE[:5] + run + VALUE[5:])}>") == "<[REDACTED:S]>"


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("filling", ["\x1b", "\x9b", "\x9d", "\x90", "\x9c"])
def test_value_with_an_escape_introducer_before_each_letter_is_redacted(encode: Callable[[str], str], filling: str):
    for value in ("c[1mP]8;;x/word", "a]b[cPd^e_f(Bg7h"):
        redactor = SecretRedactor({"S": value})
        for mixed in (filling, filling + "\u200b", "\x00" + filling):
            assert redactor.redact_text(f"<{encode(mixed.join(value))}>") == "<[REDACTED:S]>"


@pytest.mark.parametrize("filling", ["\t", "\\t", "\\\\t", "\\u0009", "%09", "&Tab;", "&#9;", "\\x09", "\\011"])
def test_tabs_in_every_encoding_are_ignored(redactor: SecretRedactor, filling: str):
    assert redactor.redact_text(f"<{filling.join(VALUE)}>") == "<[REDACTED:S]>"


@pytest.mark.parametrize(
    "filling", ["\\a", "\\b", "\\v", "\\f", "\\r", "\\e[1m", "\\e]0;title\\a", "\\e(B", "\\033[1m"]
)
def test_shell_and_c_escapes_of_control_characters_are_ignored(redactor: SecretRedactor, filling: str):
    assert redactor.redact_text(f"<{filling.join(VALUE)}>") == "<[REDACTED:S]>"


@pytest.mark.parametrize("filling", [b"\x85", b"\xad", b"\x80\x9f", b"\\x85", b"\\xad", b"%85", b"%AD", b"\\205"])
def test_latin_1_controls_are_ignored(filling: bytes):
    value = "gH7_password"
    encoded = b"<" + filling.join(bytes([letter]) for letter in value.encode()) + b">"
    assert SecretRedactor({"S": value}).redact(encoded) == b"<[REDACTED:S]>"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be"])
def test_ascii_value_is_found_in_utf_16_and_utf_32(encoding: str):
    value = "gH7_password"
    assert b"[REDACTED:S]" in SecretRedactor({"S": value}).redact(f"a {value} b".encode(encoding))


def test_invisible_characters_in_base64_are_ignored(redactor: SecretRedactor):
    code = base64.b64encode(f"user:{VALUE}:end".encode()).decode()
    for filling in ("\t", "\u200b", "\U000e0041", "\x85"):
        assert "[REDACTED:S]" in redactor.redact_text(filling.join(code))


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_value_split_over_chunks_is_found(redactor: SecretRedactor, encode: Callable[[str], str], size: int):
    for filling in ("\t", "\x85", "\u2060", "\ufffb", "\U000e0041", "\U0001d159", "\x9b1m"):
        data = f"before\n<{encode(interleave(filling))}> after\n".encode()
        stream = redactor.stream()
        redacted = b"".join([*map(stream.feed, chunks(data, size)), stream.flush()])
        assert redacted == redactor.redact(data) == b"before\n<[REDACTED:S]> after\n"


@pytest.mark.parametrize(
    "text",
    [
        "⚠️ done ✅ 👩‍💻 👨‍👩‍👧‍👦 1️⃣ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f\n",
        "مرحبا\u200f بالعالم \u061cabc می‌خواهم\n",
        "क्\u200dष नमस्ते दुनिया\n",
        "name\tsize\tdate\nab\t12\t2026\n",
        "ㅤ⠀\u115f\u1160\ufeff\n",
        "AT&T &amp; a &lt; b, ?a=1&copy=2&region=eu &notaname; &#65 &#x; &;\n",
        "\x85\xad\u2028\x9b31mred\x9b0m\n",
        "gH7_password gH7_\tpasswor\n",
    ],
)
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_text_without_a_value_is_unchanged(redactor: SecretRedactor, text: str, size: int):
    data = text.encode()
    assert redactor.redact(data) is data
    stream = redactor.stream()
    assert b"".join([*map(stream.feed, chunks(data, size)), stream.flush()]) == data


def test_value_with_invisible_characters_is_found_in_text_without_these_characters():
    value = "👩‍💻-❤️-geheim"
    redactor = SecretRedactor({"S": value})
    for encoded in (value, value.replace("\u200d", "").replace("\ufe0f", ""), json.dumps(value)[1:-1]):
        assert redactor.redact_text(f"<{encoded}>") == "<[REDACTED:S]>"


@pytest.mark.parametrize("value", ["\u3164" * 9, "\t" * 8, "\x80\u2800" * 5, "\ud800" * 8, "a\u200b" * 5])
def test_value_that_mostly_consists_of_invisible_characters_is_found_verbatim(value: str):
    redactor = SecretRedactor({"S": value})
    assert redactor.redact_text(f"a {value} b") == "a [REDACTED:S] b"
    assert redactor.redact_text("nothing\tof it\u200b") == "nothing\tof it\u200b"


@pytest.mark.parametrize("filling", [" ", "\n", "\u00a0", "\u3000", "-", "\u0301", "\ufffd"])
def test_visible_characters_are_not_ignored(redactor: SecretRedactor, filling: str):
    assert redactor.redact_text(interleave(filling)) == interleave(filling)
