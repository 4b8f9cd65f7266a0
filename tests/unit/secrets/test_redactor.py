"""Whatever leaves a runner does not tell a secret's value, however an agent writes it down."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from doubles.redaction_attacks import ESCAPES, VALUES, as_base64, letters_of_attack, values, with_noise
from sandbox.secrets.patterns import SecretPattern
from sandbox.secrets.redactor import SecretRedactor

TOKEN = "ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6"
MARK = "[REDACTED:TOKEN]"
SPREAD_MAX = 32
"""How many times its length a value may be blown up and is still found, 4 KiB more for a short one."""


@pytest.fixture(scope="module")
def redactor() -> SecretRedactor:
    return SecretRedactor({"TOKEN": TOKEN, "OTHER": VALUES[2], "KEY": VALUES[5]})


@pytest.fixture(scope="module")
def one_by_one() -> dict[str, SecretRedactor]:
    """To each value one that knows it alone."""
    return {value: SecretRedactor({"S": value}) for value in VALUES}


@settings(max_examples=200, deadline=None)
@given(
    values.flatmap(lambda value: st.tuples(st.just(value), st.lists(letters_of_attack(value), min_size=1, max_size=4)))
)
def test_no_piece_of_a_written_down_value_is_left(story: tuple[str, list[list[bytes]]]):
    value, attacks = story
    redactor = SecretRedactor({"S": value})
    for letters in attacks:
        if sum(map(len, letters)) > SPREAD_MAX * len(value) + 4096:
            continue
        redacted = redactor.redact(b"<<" + b"".join(letters) + b">>")
        rest = redacted.replace(b"[REDACTED:S]", b"\0\0")
        assert b"[REDACTED:S]" in redacted
        # What stands before and after a value in its base64 is shorter than eight letters.
        windows = {b"".join(letters[start : start + 8]) for start in range(len(letters) - 7)}
        assert [window for window in windows if window in rest] == []


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_what_holds_no_value_stays_as_it_is(one_by_one: dict[str, SecretRedactor], data: bytes):
    for value, redactor in one_by_one.items():
        if value != "aaaaaaaaaaaa":
            assert redactor.redact(data) is data


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(VALUES), st.text(max_size=60), st.text(max_size=60))
def test_what_stands_around_a_value_stays(one_by_one: dict[str, SecretRedactor], value: str, before: str, after: str):
    assume(not before.endswith("\\"))
    redacted = one_by_one[value].redact_text(f"{before}|{value}|{after}")
    assert redacted.startswith(f"{before}|")
    assert redacted.endswith(f"|{after}")


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("value", VALUES)
def test_every_escape_of_every_value(one_by_one: dict[str, SecretRedactor], value: str, escape: Any):
    redacted = one_by_one[value].redact_text(f"<{escape(value)}>")
    assert redacted.startswith("<")
    assert "[REDACTED:S]" in redacted
    assert len(redacted) <= len("<[REDACTED:S]>") + 8


@pytest.mark.parametrize(
    "value", ["ähnlich-geheim-1", "пароль-секрет-123", "😀-as-a-password", "%A4hnlich-geheim-1", "\\xa4hnlich-1"]
)
@pytest.mark.parametrize("first", ["", "Ĥ", "ä", "¤", "п", "ѿ", "😀", "🐀", "\ud83d", "\\"])
def test_a_value_that_begins_with_another_letter_than_ascii_is_found_in_texts(value: str, first: str):
    redactor = SecretRedactor({"S": value})
    redacted = redactor.redact_text(f"<{value}> {first}{value[1:]} {first}hnlich-geheim-1 {first}{value}>")
    assert redacted.startswith("<[REDACTED:S]> ")
    assert value not in redacted


LETTERS = "pässwörd-x1 & 7"


@pytest.mark.parametrize(
    "written",
    [
        ascii(LETTERS)[1:-1].encode(),
        json.dumps(ascii(LETTERS)).encode(),
        "".join(f"\\x{ord(letter):02x}" for letter in LETTERS).encode(),
        "".join(f"\\{ord(letter):o}" for letter in LETTERS).encode(),
        "".join(f"\\u{{{ord(letter):x}}}" for letter in LETTERS).encode(),
        LETTERS.encode("latin-1"),
        quote(LETTERS.encode("latin-1")).encode(),
        base64.b64encode(b"u:" + LETTERS.encode("latin-1") + b"!"),
        base64.b64encode(quote_plus(LETTERS).encode() + b"!"),
        quote_plus(LETTERS).encode().hex().encode(),
        LETTERS.encode("latin-1").hex().encode(),
    ],
)
def test_letters_with_a_number_of_two_digits_and_short_escapes(written: bytes):
    redacted = SecretRedactor({"S": LETTERS}).redact(written)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted.strip(b'"')) <= len("[REDACTED:S]") + 5


def test_letters_of_several_kinds_as_python_writes_them():
    value = "pässwörd-€-😀-1"
    assert SecretRedactor({"S": value}).redact_text(f"<{value!a}>") == "<'[REDACTED:S]'>"


@pytest.mark.parametrize("value", ["pässwordxyz%", "pässwordxyz%4", "pässwordxyz\\", "pässwordxyz\\x", "pässwordxyz&"])
@pytest.mark.parametrize("after", ["41", "1", "x41", "#65;", " 41", "n"])
def test_what_stands_behind_a_value_may_make_an_escape_of_its_end(value: str, after: str):
    redacted = SecretRedactor({"S": value}).redact_text(json.dumps(value + after))
    assert redacted.startswith('"[REDACTED:S]')
    assert len(redacted) <= len('"[REDACTED:S]"') + 3 + len(after)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("url_safe", [True, False])
def test_base64_at_every_alignment(one_by_one: dict[str, SecretRedactor], value: str, before: int, url_safe: bool):
    code = as_base64(value * 1, before, url_safe)
    for written in (code, code.replace("\n", "\r\n"), json.dumps(code), json.dumps(json.dumps(code))):
        redacted = one_by_one[value].redact_text(written)
        assert "[REDACTED:S]" in redacted
        assert len(redacted.strip('"\\')) <= len("[REDACTED:S]") + 12


def test_a_docker_login_is_base64_in_base64(redactor: SecretRedactor):
    login = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    config = json.dumps({"auths": {"registry.example": {"auth": login}}})
    assert MARK in redactor.redact_text(base64.b64encode(config.encode()).decode())


def test_a_tools_answer_inside_a_line_of_events(redactor: SecretRedactor):
    answer = json.dumps({"env": {"GITHUB_TOKEN": TOKEN, "PASSWORD": VALUES[2]}}, indent=2)
    line = json.dumps({"type": "user", "message": {"content": [{"type": "tool_result", "content": answer}]}})
    event = json.loads(redactor.redact_text(line))
    inner = json.loads(event["message"]["content"][0]["content"])
    assert inner == {"env": {"GITHUB_TOKEN": MARK, "PASSWORD": "[REDACTED:OTHER]"}}


@settings(max_examples=60, deadline=None)
@given(values, st.booleans())
def test_json_stays_json(value: str, ascii_only: bool):
    text, redactor = f"it is {value} there", SecretRedactor({"S": value})
    for depth in range(1, 5):
        text = json.dumps({"text": text}, ensure_ascii=ascii_only)
        redacted = redactor.redact_text(text)
        assert "[REDACTED:S]" in redacted
        for _ in range(depth):
            redacted = json.loads(redacted)["text"]


def test_terminal_escapes_in_between(redactor: SecretRedactor):
    for seed in range(20):
        noisy = with_noise(TOKEN, seed)
        in_c = noisy.replace("\\", "\\\\").replace("\x1b", "\\033")
        for written in (noisy, json.dumps(noisy), json.dumps(json.dumps(noisy)), in_c):
            assert TOKEN[-9:-1] not in redactor.redact_text(written)
            assert MARK in redactor.redact_text(written)


def test_a_value_with_its_letters_apart_as_in_utf_16(redactor: SecretRedactor):
    assert MARK.encode() in redactor.redact(TOKEN.encode("utf-16-le"))


def test_dumps_in_hex_with_blanks_and_breaks(redactor: SecretRedactor):
    code = TOKEN.encode().hex()
    pairs = " ".join(code[start : start + 2] for start in range(0, len(code), 2))
    for written in (code, code.upper(), pairs, code[:60] + "\n" + code[60:]):
        assert redactor.redact_text(written) == MARK


def test_a_host_name_is_told_in_lower_case(redactor: SecretRedactor):
    assert redactor.redact_text(f"{TOKEN.lower()}.evil.example") == f"{MARK}.evil.example"


def test_file_and_branch_names_as_git_quotes_them(redactor: SecretRedactor):
    value = "naïve-schlüssel-ß"
    quoted = "".join(chr(byte) if byte < 128 else f"\\{byte:03o}" for byte in value.encode())
    redacted = SecretRedactor({"S": value}).redact_text(f'diff --git "a/{quoted}" "b/{quoted}"')
    assert redacted == 'diff --git "a/[REDACTED:S]" "b/[REDACTED:S]"'
    assert redactor.redact_text(f"error: cannot open refs/heads/{TOKEN}") == f"error: cannot open refs/heads/{MARK}"


def test_lines_of_a_value_are_found_one_by_one_as_in_a_diff(redactor: SecretRedactor):
    diff = "".join(f"+{line}\n" for line in VALUES[5].splitlines())
    assert "MIIEvQ" not in redactor.redact_text(diff)
    assert redactor.redact_text(diff).startswith("+-----BEGIN KEY-----\n+[REDACTED:KEY]\n")


def test_values_of_a_task_that_are_too_short_are_named_and_left():
    redactor = SecretRedactor({"PIN": "1234567", "TOKEN": TOKEN, "NONE": ""})
    assert redactor.too_short_names == ("PIN", "NONE")
    assert redactor.redact_text(f"1234567 {TOKEN}") == f"1234567 {MARK}"


@pytest.mark.parametrize(
    "value",
    [
        "\\" * 8,
        "\r" * 8,
        "        ",
        "\\\\\\nnnnn",
        "++++++++",
        "\x1b[0m\x1b[1m",
        "%%%%%%%%",
    ],
)
def test_strange_values_are_found_where_they_stand(value: str):
    redactor = SecretRedactor({"S": value})
    assert redactor.redact_text(f"a{value}b") == "a[REDACTED:S]b"
    assert redactor.redact_text("nothing of it") == "nothing of it"


def test_plain_json_data_is_redacted_in_texts_and_keys(redactor: SecretRedactor):
    value = {"a": [TOKEN, 1, None, True, 2.5], TOKEN: {"b": f"x {TOKEN}"}, "c": ("y",)}
    assert redactor.redact_json(value) == {
        "a": [MARK, 1, None, True, 2.5],
        MARK: {"b": f"x {MARK}"},
        "c": ["y"],
    }


def test_text_of_any_kind_goes_through(redactor: SecretRedactor):
    for text in ("", "\ud800 lone", "é🔑", "\0"):
        assert redactor.redact_text(text) == text
        assert redactor.redact_text(text + TOKEN) == text + MARK


def test_nothing_tells_the_values(redactor: SecretRedactor):
    stream = redactor.stream()
    stream.feed(TOKEN[:20].encode())
    for thing in (redactor, stream):
        assert "ghp" not in repr(thing) + str(thing)
    assert "ghp" not in repr(SecretPattern(TOKEN.encode(), "TOKEN"))


def test_many_secrets_cost_no_more_than_few():
    line = b'{"type":"assistant","text":"' + b"some ordinary words, \\n and more of them " * 24 + b'"}\n'
    many = SecretRedactor({f"S{index}": f"{index:02}x{TOKEN}" for index in range(64)})
    few = SecretRedactor({"S": TOKEN})

    def seconds(redactor: SecretRedactor) -> float:
        begin = time.process_time()
        for _ in range(300):
            redactor.redact(line)
        return time.process_time() - begin

    assert min(seconds(many) for _ in range(3)) < 4 * min(seconds(few) for _ in range(3)) + 0.05


def test_a_runner_loads_no_client_of_vault():
    script = (
        "import sys, sandbox.secrets.redactor; "
        "print(sorted(set(sys.modules) & {'hvac', 'requests', 'urllib3', 'ssl', 'asyncio', 'socket'}))"
    )
    loading = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (loading.returncode, loading.stdout.strip()) == (0, "[]"), loading.stderr


LONG_ESCAPES = {
    "echo": r"\0147\0150\0160_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "one letter": r"ghp_aB3dE6gH9jK2mN5p\01218sT1vW4yZ7bC0eF3hI6",
    "hex in C": r"ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3\x0000068I6",
    "short in a shell": r"ghp_aB3dE6gH9jK2mN5p\u51\u38sT1vW4yZ7bC0eF3hI6",
    "in JSON": r"ghp_aB3dE6gH9jK2mN5p\\0121\\0070sT1vW4yZ7bC0eF3hI6",
    "in an address": "ghp_aB3dE6gH9jK2mN5p%5C0121%5C0070sT1vW4yZ7bC0eF3hI6",
    "short ones": r"ghp_aB3dE6gH9jK2mN5p\121\70sT1vW4yZ7bC0eF3hI6",
    "a control before a digit": r"ghp_aB3dE6gH\0119jK2mN\0165pQ8sT1vW4yZ7bC0eF3hI6",
}


@pytest.mark.parametrize("text", LONG_ESCAPES.values(), ids=LONG_ESCAPES)
def test_escapes_of_either_length_are_read(redactor: SecretRedactor, text: str):
    assert redactor.redact_text(f"a {text} b") == f"a {MARK} b"
    stream = redactor.stream()
    assert b"".join([*(stream.feed(bytes([byte])) for byte in text.encode()), stream.flush()]) == MARK.encode()


def test_text_with_escapes_of_either_length_stays_as_it_is(redactor: SecretRedactor):
    text = r"printf '\0101\0102' \x0041 \u41 C:\users\U0 \0"
    assert redactor.redact_text(text) == text


HOSTILE = {
    "backslashes": b"\\" * 250_000,
    "escapes": b"\\u0041" * 40_000,
    "short octals": b"\\67" * 40_000,
    "long octals": b"\\0163" * 40_000,
    "octals of backslashes": b"\\0134x005c0163" * 20_000,
    "hex with zeros": (b"\\x" + b"0" * 1100) * 300,
    "braces": b"\\u{e4" * 40_000,
    "nested percent": b"%25252525252525" * 15_000,
    "colours": b"\x1b[31m" * 50_000,
    "links without an end": b"\x1b]8;;" * 50_000,
    "almost": (TOKEN[:-1] + " ").encode() * 6_000,
    "beginnings": TOKEN[:20].encode() * 12_500,
    "quotes": b"'" * 250_000,
    "entities": b"&#" * 125_000,
    "ampersands": b"&" * 1_000_000,
    "open names": b"&lt" * 100_000,
    "names that are none": b"&CounterClockwiseContourIntegrax" * 10_000,
    "open numbers": b"&#65" * 75_000,
    "zeros": (b"&#" + b"0" * 1100) * 300,
    "C1 titles without an end": "\x9d".encode() * 125_000,
    "C1 colours without an end": "\x9b".encode() * 125_000,
    "strays": b"a\x85" * 125_000,
    "fillers": "\u3164".encode() * 80_000,
    "halves of pairs": b"\\ud800" * 40_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_nothing_takes_long(redactor: SecretRedactor, data: bytes):
    begin = time.process_time()
    redactor.redact(data)
    stream = redactor.stream()
    for start in range(0, len(data), 65536):
        stream.feed(data[start : start + 65536])
    assert time.process_time() - begin < 3


def lines_of(code: str, width: int, end: str = "\n") -> str:
    return "".join(code[at : at + width] + end for at in range(0, len(code), width))


LONG = "sk-api03-" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6" * 3


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("inner", ["base64", "openssl", "mime", "xxd"])
@pytest.mark.parametrize("outer", ["base64", "xxd"])
def test_a_long_value_in_wrapped_base64_or_hex_that_is_encoded_once_more(inner: str, outer: str, end: str):
    """As `base64 | base64` gives it."""
    ways: dict[str, Callable[[bytes], str]] = {
        "base64": lambda data: lines_of(base64.b64encode(data).decode(), 76),
        "openssl": lambda data: lines_of(base64.b64encode(data).decode(), 64),
        "mime": lambda data: lines_of(base64.b64encode(data).decode(), 76, "\r\n"),
        "xxd": lambda data: lines_of(data.hex(), 60),
    }
    text = ways[outer](ways[inner]((LONG + end).encode()).encode())
    other = ways[outer](ways[inner]((LONG[::-1] + end).encode()).encode())
    redactor = SecretRedactor({"KEY": LONG})
    assert redactor.redact_text(f"it is {text}!").startswith("it is [REDACTED:KEY]")
    assert redactor.redact_text(other) is other


def test_a_line_of_a_value_may_begin_with_dashes():
    redactor = SecretRedactor({"KEY": "the first line of it\n-----5f1d7c3a9e8b2d4f6a0c\n-----BEGIN RSA KEY-----"})
    assert redactor.redact_text("+-----5f1d7c3a9e8b2d4f6a0c\n") == "+[REDACTED:KEY]\n"
    assert redactor.redact_text("-----BEGIN RSA KEY-----\n") == "-----BEGIN RSA KEY-----\n"
