"""A runner's output does not contain a secret's value in any encoding."""

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

from doubles.redaction_attacks import ESCAPES, VALUES, as_base64, encode_characters, values, with_noise
from sandbox.secrets.redaction.redactor import SecretRedactor
from sandbox.secrets.redaction.value_patterns import SecretPattern

TOKEN = "ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6"
REPLACEMENT = "[REDACTED:TOKEN]"
EXPANSION_MAX = 32
"""An encoded value is found if it is at most this many times as long as the value, plus 4 KiB."""


@pytest.fixture(scope="module")
def redactor() -> SecretRedactor:
    return SecretRedactor({"TOKEN": TOKEN, "OTHER": VALUES[2], "PATH": VALUES[3], "KEY": VALUES[5]})


@pytest.fixture(scope="module")
def redactors() -> dict[str, SecretRedactor]:
    """One redactor per value."""
    return {value: SecretRedactor({"S": value}) for value in VALUES}


@settings(max_examples=200, deadline=None)
@given(
    values.flatmap(lambda value: st.tuples(st.just(value), st.lists(encode_characters(value), min_size=1, max_size=4)))
)
def test_no_part_of_an_encoded_value_remains(case: tuple[str, list[list[bytes]]]):
    value, attacks = case
    redactor = SecretRedactor({"S": value})
    for letters in attacks:
        if sum(map(len, letters)) > EXPANSION_MAX * len(value) + 4096:
            continue
        redacted = redactor.redact(b"<<" + b"".join(letters) + b">>")
        remainder = redacted.replace(b"[REDACTED:S]", b"\0\0")
        assert b"[REDACTED:S]" in redacted
        # The base64 remainders before and after a value are each shorter than eight characters.
        windows = {b"".join(letters[start : start + 8]) for start in range(len(letters) - 7)}
        assert [window for window in windows if window in remainder] == []


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_data_without_a_value_is_unchanged(redactors: dict[str, SecretRedactor], data: bytes):
    for value, redactor in redactors.items():
        if value != "aaaaaaaaaaaa":
            assert redactor.redact(data) is data


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(VALUES), st.text(max_size=60), st.text(max_size=60))
def test_text_around_a_value_is_unchanged(redactors: dict[str, SecretRedactor], value: str, before: str, after: str):
    assume(not before.endswith("\\"))
    redacted = redactors[value].redact_text(f"{before}|{value}|{after}")
    assert redacted.startswith(f"{before}|")
    assert redacted.endswith(f"|{after}")


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("value", VALUES)
def test_every_escape_of_every_value_is_redacted(redactors: dict[str, SecretRedactor], value: str, escape: Any):
    redacted = redactors[value].redact_text(f"<{escape(value)}>")
    assert redacted.startswith("<")
    assert "[REDACTED:S]" in redacted
    assert len(redacted) <= len("<[REDACTED:S]>") + 8


@pytest.mark.parametrize(
    "value", ["ähnlich-geheim-1", "пароль-секрет-123", "😀-as-a-password", "%A4hnlich-geheim-1", "\\xa4hnlich-1"]
)
@pytest.mark.parametrize("first", ["", "Ĥ", "ä", "¤", "п", "ѿ", "😀", "🐀", "\ud83d", "\\"])
def test_value_with_a_non_ascii_first_letter_is_found(value: str, first: str):
    redactor = SecretRedactor({"S": value})
    redacted = redactor.redact_text(f"<{value}> {first}{value[1:]} {first}hnlich-geheim-1 {first}{value}>")
    assert redacted.startswith("<[REDACTED:S]> ")
    assert value not in redacted


LATIN_1_VALUE = "pässwörd-x1 & 7"


@pytest.mark.parametrize(
    "encoded",
    [
        ascii(LATIN_1_VALUE)[1:-1].encode(),
        json.dumps(ascii(LATIN_1_VALUE)).encode(),
        "".join(f"\\x{ord(letter):02x}" for letter in LATIN_1_VALUE).encode(),
        "".join(f"\\{ord(letter):o}" for letter in LATIN_1_VALUE).encode(),
        "".join(f"\\u{{{ord(letter):x}}}" for letter in LATIN_1_VALUE).encode(),
        LATIN_1_VALUE.encode("latin-1"),
        quote(LATIN_1_VALUE.encode("latin-1")).encode(),
        base64.b64encode(b"u:" + LATIN_1_VALUE.encode("latin-1") + b"!"),
        base64.b64encode(quote_plus(LATIN_1_VALUE).encode() + b"!"),
        quote_plus(LATIN_1_VALUE).encode().hex().encode(),
        LATIN_1_VALUE.encode("latin-1").hex().encode(),
    ],
)
def test_latin_1_letters_and_short_escapes_are_redacted(encoded: bytes):
    redacted = SecretRedactor({"S": LATIN_1_VALUE}).redact(encoded)
    assert b"[REDACTED:S]" in redacted
    assert len(redacted.strip(b'"')) <= len("[REDACTED:S]") + 5


ADDRESS = "db://u:p(4)ss'w0rd!@h/x?y=<1>&z=%2"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ADDRESS),
        json.dumps(ADDRESS).replace("/", "\\/"),
        json.dumps(ADDRESS).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
        quote(ADDRESS),
        quote_plus(ADDRESS),
        quote(ADDRESS, safe="!'()*~"),
        quote(ADDRESS, safe="!'()*~;/?:@&=+$,#"),
    ],
)
def test_base64_of_every_common_json_and_url_encoding_is_redacted(text: str):
    redactor = SecretRedactor({"S": ADDRESS})
    for before in range(3):
        encoded = f"<{as_base64(text, before, url_safe=True)}>"
        assert "[REDACTED:S]" in redactor.redact_text(encoded)
        other = f"<{as_base64(text[::-1], before, url_safe=True)}>"
        assert redactor.redact_text(other) is other
    assert "[REDACTED:S]" in redactor.redact_text(text.encode().hex())


def test_python_repr_with_mixed_escapes_is_redacted():
    value = "pässwörd-€-😀-1"
    assert SecretRedactor({"S": value}).redact_text(f"<{value!a}>") == "<'[REDACTED:S]'>"


@pytest.mark.parametrize("value", ["pässwordxyz%", "pässwordxyz%4", "pässwordxyz\\", "pässwordxyz\\x", "pässwordxyz&"])
@pytest.mark.parametrize("after", ["41", "1", "x41", "#65;", " 41", "n"])
def test_value_is_redacted_even_if_the_following_text_completes_an_escape(value: str, after: str):
    redacted = SecretRedactor({"S": value}).redact_text(json.dumps(value + after))
    assert redacted.startswith('"[REDACTED:S]')
    assert len(redacted) <= len('"[REDACTED:S]"') + 3 + len(after)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("url_safe", [True, False])
def test_base64_is_redacted_at_every_alignment(
    redactors: dict[str, SecretRedactor], value: str, before: int, url_safe: bool
):
    code = as_base64(value * 1, before, url_safe)
    for encoded in (code, code.replace("\n", "\r\n"), json.dumps(code), json.dumps(json.dumps(code))):
        redacted = redactors[value].redact_text(encoded)
        assert "[REDACTED:S]" in redacted
        assert len(redacted.strip('"\\')) <= len("[REDACTED:S]") + 12


def test_base64_in_base64_is_redacted(redactor: SecretRedactor):
    login = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    config = json.dumps({"auths": {"registry.example": {"auth": login}}})
    assert REPLACEMENT in redactor.redact_text(base64.b64encode(config.encode()).decode())


def test_json_tool_result_inside_a_json_event_is_redacted(redactor: SecretRedactor):
    tool_result = json.dumps({"env": {"GITHUB_TOKEN": TOKEN, "PASSWORD": VALUES[2]}}, indent=2)
    line = json.dumps({"type": "user", "message": {"content": [{"type": "tool_result", "content": tool_result}]}})
    event = json.loads(redactor.redact_text(line))
    inner = json.loads(event["message"]["content"][0]["content"])
    assert inner == {"env": {"GITHUB_TOKEN": REPLACEMENT, "PASSWORD": "[REDACTED:OTHER]"}}


@settings(max_examples=60, deadline=None)
@given(values, st.booleans())
def test_redacted_json_is_valid(value: str, ascii_only: bool):
    text, redactor = f"it is {value} there", SecretRedactor({"S": value})
    for depth in range(1, 5):
        text = json.dumps({"text": text}, ensure_ascii=ascii_only)
        redacted = redactor.redact_text(text)
        assert "[REDACTED:S]" in redacted
        for _ in range(depth):
            redacted = json.loads(redacted)["text"]


def test_terminal_escapes_inside_a_value_do_not_hide_it(redactor: SecretRedactor):
    for seed in range(20):
        noisy = with_noise(TOKEN, seed)
        c_escaped = noisy.replace("\\", "\\\\").replace("\x1b", "\\033")
        for encoded in (noisy, json.dumps(noisy), json.dumps(json.dumps(noisy)), c_escaped):
            assert TOKEN[-9:-1] not in redactor.redact_text(encoded)
            assert REPLACEMENT in redactor.redact_text(encoded)


def test_utf_16_value_is_redacted(redactor: SecretRedactor):
    assert REPLACEMENT.encode() in redactor.redact(TOKEN.encode("utf-16-le"))


def test_hex_dump_with_spaces_and_line_breaks_is_redacted(redactor: SecretRedactor):
    code = TOKEN.encode().hex()
    pairs = " ".join(code[start : start + 2] for start in range(0, len(code), 2))
    for encoded in (code, code.upper(), pairs, code[:60] + "\n" + code[60:]):
        assert redactor.redact_text(encoded) == REPLACEMENT


def test_lower_case_host_name_is_redacted(redactor: SecretRedactor):
    assert redactor.redact_text(f"{TOKEN.lower()}.evil.example") == f"{REPLACEMENT}.evil.example"


def test_git_quoted_file_and_branch_names_are_redacted(redactor: SecretRedactor):
    value = "naïve-schlüssel-ß"
    quoted = "".join(chr(byte) if byte < 128 else f"\\{byte:03o}" for byte in value.encode())
    redacted = SecretRedactor({"S": value}).redact_text(f'diff --git "a/{quoted}" "b/{quoted}"')
    assert redacted == 'diff --git "a/[REDACTED:S]" "b/[REDACTED:S]"'
    assert (
        redactor.redact_text(f"error: cannot open refs/heads/{TOKEN}") == f"error: cannot open refs/heads/{REPLACEMENT}"
    )


def test_lines_of_a_multiline_value_are_found_separately(redactor: SecretRedactor):
    diff = "".join(f"+{line}\n" for line in VALUES[5].splitlines())
    assert "MIIEvQ" not in redactor.redact_text(diff)
    assert redactor.redact_text(diff).startswith("+-----BEGIN KEY-----\n+[REDACTED:KEY]\n")


def test_short_values_are_listed_but_not_redacted():
    redactor = SecretRedactor({"PIN": "1234567", "TOKEN": TOKEN, "NONE": ""})
    assert redactor.unsearchable_secret_names == ("PIN", "NONE")
    assert redactor.redact_text(f"1234567 {TOKEN}") == f"1234567 {REPLACEMENT}"


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
def test_values_that_consist_of_special_characters_are_found_verbatim(value: str):
    redactor = SecretRedactor({"S": value})
    assert redactor.redact_text(f"a{value}b") == "a[REDACTED:S]b"
    assert redactor.redact_text("ordinary text") == "ordinary text"


def test_json_data_is_redacted_in_strings_and_keys(redactor: SecretRedactor):
    value = {"a": [TOKEN, 1, None, True, 2.5], TOKEN: {"b": f"x {TOKEN}"}, "c": ("y",)}
    assert redactor.redact_json(value) == {
        "a": [REPLACEMENT, 1, None, True, 2.5],
        REPLACEMENT: {"b": f"x {REPLACEMENT}"},
        "c": ["y"],
    }


def test_unusual_text_is_preserved(redactor: SecretRedactor):
    for text in ("", "\ud800 lone", "é🔑", "\0"):
        assert redactor.redact_text(text) == text
        assert redactor.redact_text(text + TOKEN) == text + REPLACEMENT


def test_repr_does_not_contain_values(redactor: SecretRedactor):
    stream = redactor.stream()
    stream.feed(TOKEN[:20].encode())
    for item in (redactor, stream):
        assert "ghp" not in repr(item) + str(item)
    assert "ghp" not in repr(SecretPattern(TOKEN.encode(), "TOKEN"))


def test_redaction_time_is_almost_independent_of_the_number_of_secrets():
    line = b'{"type":"assistant","text":"' + b"some ordinary words, \\n and more of them " * 24 + b'"}\n'
    many = SecretRedactor({f"S{index}": f"{index:02}x{TOKEN}" for index in range(64)})
    few = SecretRedactor({"S": TOKEN})

    def seconds(redactor: SecretRedactor) -> float:
        begin = time.process_time()
        for _ in range(300):
            redactor.redact(line)
        return time.process_time() - begin

    assert min(seconds(many) for _ in range(3)) < 4 * min(seconds(few) for _ in range(3)) + 0.05


def test_redactor_does_not_import_the_vault_client():
    script = (
        "import sys, sandbox.secrets.redaction.redactor; "
        "print(sorted(set(sys.modules) & {'hvac', 'requests', 'urllib3', 'ssl', 'asyncio', 'socket'}))"
    )
    process = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr


LONG_ESCAPES = {
    "echo": r"\0147\0150\0160_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "one octal": r"ghp_aB3dE6gH9jK2mN5p\01218sT1vW4yZ7bC0eF3hI6",
    "hex in C": r"ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3\x0000068I6",
    "short in a shell": r"ghp_aB3dE6gH9jK2mN5p\u51\u38sT1vW4yZ7bC0eF3hI6",
    "in JSON": r"ghp_aB3dE6gH9jK2mN5p\\0121\\0070sT1vW4yZ7bC0eF3hI6",
    "percent-encoded": "ghp_aB3dE6gH9jK2mN5p%5C0121%5C0070sT1vW4yZ7bC0eF3hI6",
    "short octals": r"ghp_aB3dE6gH9jK2mN5p\121\70sT1vW4yZ7bC0eF3hI6",
    "a control before a digit": r"ghp_aB3dE6gH\0119jK2mN\0165pQ8sT1vW4yZ7bC0eF3hI6",
}


@pytest.mark.parametrize("text", LONG_ESCAPES.values(), ids=LONG_ESCAPES)
def test_short_and_long_escapes_are_decoded(redactor: SecretRedactor, text: str):
    assert redactor.redact_text(f"a {text} b") == f"a {REPLACEMENT} b"
    stream = redactor.stream()
    assert b"".join([*(stream.feed(bytes([byte])) for byte in text.encode()), stream.flush()]) == REPLACEMENT.encode()


def test_text_with_short_and_long_escapes_is_unchanged(redactor: SecretRedactor):
    text = r"printf '\0101\0102' \x0041 \u41 C:\users\U0 \0"
    assert redactor.redact_text(text) == text


JOINED_ESCAPES = {
    "decimal in JSON": r"ghp_&#9\u0037;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "hex in JSON": r"ghp_&#x6\u0031;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "semicolon in JSON": r"ghp_&#97\u003bB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "octal in HTML": r"ghp_\14&#49;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "octal, percent-encoded": r"ghp_\1%341B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "HTML in HTML": r"ghp_&#9&#x37;;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "invisible character": "ghp_&#9\u200b7;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "three layers": r"ghp_&#9\u00&#51;7;B3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "sequence": r"ghp_\141\102\63\144\105\66gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
    "sequence in HTML": "ghp_&#97&#66&#51&#100E6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
}
"""Escapes in which a character is escaped again, and sequences of escapes without terminators."""


@pytest.mark.parametrize("text", JOINED_ESCAPES.values(), ids=JOINED_ESCAPES)
def test_escapes_with_escaped_characters_are_redacted(redactor: SecretRedactor, text: str):
    assert redactor.redact_text(f"a {text} b") == f"a {REPLACEMENT} b"
    stream = redactor.stream()
    assert b"".join([*(stream.feed(bytes([byte])) for byte in text.encode()), stream.flush()]) == REPLACEMENT.encode()


def test_joined_surrogate_pair_and_named_reference_are_redacted():
    redactor = SecretRedactor({"T": "pass<word😀1234"})
    assert redactor.redact_text(r"a pass&lt\u003bword\ud83d%5Cude001234 b") == "a [REDACTED:T] b"


def test_text_with_joined_escapes_is_unchanged(redactor: SecretRedactor):
    text = r"x &#9\u0037; \14&#49; \1%341 &lt\u003b \67\67 &#65&#66 \ud83d%5Cude00 C:\1\2 ?a=1&amp=%20"
    assert redactor.redact_text(text) == text


HOSTILE = {
    "joined octals": b"\\1&#48;4" * 20_000,
    "joined numbers": b"&#1\\u0032" * 20_000,
    "backslashes": b"\\" * 250_000,
    "escapes": b"\\u0041" * 40_000,
    "short octals": b"\\67" * 40_000,
    "long octals": b"\\0163" * 40_000,
    "octals of backslashes": b"\\0134x005c0163" * 20_000,
    "hex with zeros": (b"\\x" + b"0" * 1100) * 300,
    "braces": b"\\u{e4" * 40_000,
    "nested percent": b"%25252525252525" * 15_000,
    "colours": b"\x1b[31m" * 50_000,
    "unterminated links": b"\x1b]8;;" * 50_000,
    "near matches": (TOKEN[:-1] + " ").encode() * 6_000,
    "prefixes": TOKEN[:20].encode() * 12_500,
    "quotes": b"'" * 250_000,
    "escaped quotes": b"\\'\\\\\\'" * 40_000,
    "escaped quotes of both kinds": b"\\'\"\\'\"" * 40_000,
    "entities": b"&#" * 125_000,
    "ampersands": b"&" * 1_000_000,
    "names without a semicolon": b"&lt" * 100_000,
    "unknown names": b"&CounterClockwiseContourIntegrax" * 10_000,
    "numbers without a semicolon": b"&#65" * 75_000,
    "zeros": (b"&#" + b"0" * 1100) * 300,
    "unterminated C1 titles": "\x9d".encode() * 125_000,
    "unterminated C1 colours": "\x9b".encode() * 125_000,
    "stray bytes": b"a\x85" * 125_000,
    "fillers": "\u3164".encode() * 80_000,
    "lone surrogates": b"\\ud800" * 40_000,
    "escapes and invisible text": b"\\x41%41 \r\x1b[1m&amp;\xe2\x80\x8b" * 10_000,
    "nested escapes and titles": b"\x1b]0;\x1b\\%2525\\\\u005cx41\r&amp;amp;\xe2\x80\x8b\\0060" * 6_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_input_is_redacted_in_bounded_time(redactor: SecretRedactor, data: bytes):
    begin = time.process_time()
    redactor.redact(data)
    stream = redactor.stream()
    for start in range(0, len(data), 65536):
        stream.feed(data[start : start + 65536])
    assert time.process_time() - begin < 3


def wrap_lines(code: str, width: int, end: str = "\n") -> str:
    return "".join(code[at : at + width] + end for at in range(0, len(code), width))


LONG = "sk-api03-" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6" * 3


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("inner", ["base64", "openssl", "mime", "xxd"])
@pytest.mark.parametrize("outer", ["base64", "xxd"])
def test_long_value_in_doubly_encoded_wrapped_base64_or_hex_is_found(inner: str, outer: str, end: str):
    """For example, the output of `base64 | base64`."""
    encoders: dict[str, Callable[[bytes], str]] = {
        "base64": lambda data: wrap_lines(base64.b64encode(data).decode(), 76),
        "openssl": lambda data: wrap_lines(base64.b64encode(data).decode(), 64),
        "mime": lambda data: wrap_lines(base64.b64encode(data).decode(), 76, "\r\n"),
        "xxd": lambda data: wrap_lines(data.hex(), 60),
    }
    text = encoders[outer](encoders[inner]((LONG + end).encode()).encode())
    other = encoders[outer](encoders[inner]((LONG[::-1] + end).encode()).encode())
    redactor = SecretRedactor({"KEY": LONG})
    assert redactor.redact_text(f"it is {text}!").startswith("it is [REDACTED:KEY]")
    assert redactor.redact_text(other) is other


def test_line_of_a_value_may_start_with_dashes():
    redactor = SecretRedactor({"KEY": "the first line of it\n-----5f1d7c3a9e8b2d4f6a0c\n-----BEGIN RSA KEY-----"})
    assert redactor.redact_text("+-----5f1d7c3a9e8b2d4f6a0c\n") == "+[REDACTED:KEY]\n"
    assert redactor.redact_text("-----BEGIN RSA KEY-----\n") == "-----BEGIN RSA KEY-----\n"


@pytest.mark.parametrize("before", [b"", b"\x1b[1m", b"\x1b]0;title\x07"])
def test_terminal_escapes_inside_nested_octals_are_removed(before: bytes):
    def encode(data: bytes) -> bytes:
        return b"".join(b"\\0%03o" % byte for byte in data)

    colored = TOKEN[:5].encode() + b"\x1b(B\x1b]8;;http://x/\x1b\\" + TOKEN[5:].encode()
    assert SecretRedactor({"S": TOKEN}).redact(before + encode(encode(colored))) == before + b"[REDACTED:S]"
