"""The redaction of a stream does not depend on its chunking, and buffers as little as possible."""

import base64
import json
import random
import secrets as system_secrets
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from doubles.redaction_attacks import VALUES, attack, texts, values
from sandbox.secrets.redaction.escape_layers import DecodedLayer
from sandbox.secrets.redaction.redactor import Scanner, SecretRedactor, Span

TOKEN = "ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6"


def redact_chunked(redactor: SecretRedactor, data: bytes, cuts: list[int]) -> bytes:
    stream = redactor.stream()
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join([*(stream.feed(data[start:end]) for start, end in pairwise(positions)), stream.flush()])


@settings(max_examples=120, deadline=None)
@given(st.lists(values, min_size=1, max_size=3), st.data())
def test_chunking_does_not_change_the_result(secrets: list[str], data: st.DataObject):
    redactor = SecretRedactor({f"S{index}": value for index, value in enumerate(secrets)})
    for _ in range(2):
        pieces = data.draw(st.lists(texts | st.sampled_from(secrets).flatmap(attack), max_size=5))
        whole = b"".join(pieces)
        redacted = redactor.redact(whole)
        for cuts in data.draw(st.lists(st.lists(st.integers(0, 1 << 16), max_size=12), min_size=1, max_size=3)):
            assert redact_chunked(redactor, whole, cuts) == redacted


@pytest.mark.parametrize(
    "before",
    [
        b"\x9b",
        b"\x00\x9b",
        b" \x9b",
        "é".encode() + b"\x9b",
        b"\xe9 \x9b",
        b"\xff\x9d",
        b"\xe2\x9b",
        b"%e2%9b",
        "Ā".encode(),
    ],
)
def test_latin_1_byte_before_a_value_with_escapes_does_not_change_the_result(before: bytes):
    redactor = SecretRedactor({"TOKEN": TOKEN})
    data = (
        before + TOKEN[:3].encode() + b"\x1b(B" + TOKEN[3:20].encode() + "\u200b".encode() + TOKEN[20:].encode() + b"!"
    )
    assert redactor.redact(data) == before + b"[REDACTED:TOKEN]!"
    for cut in range(1, len(data)):
        assert redact_chunked(redactor, data, [cut]) == before + b"[REDACTED:TOKEN]!"


def test_complete_character_is_emitted_immediately():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    for text in ("é", "❯", "😀", "中文", "Ā"):
        assert stream.feed(text.encode()) == text.encode()
    assert stream.feed("❯".encode()[:2]) == b""
    assert stream.feed("❯".encode()[2:]) == "❯".encode()
    assert stream.feed(b"\xe9") + stream.flush() == b"\xe9"


# Each byte causes a new scan of the pending data, so 3 KB of nested escapes take 8 s.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.sampled_from(VALUES)
    .flatmap(lambda value: st.tuples(st.just(value), texts, attack(value), texts))
    .filter(lambda case: sum(map(len, case[1:])) <= 600)
)
def test_stream_of_single_bytes_is_redacted_like_the_whole_text(case: tuple[str, bytes, bytes, bytes]):
    value, *pieces = case
    redactor, whole = SecretRedactor({"S": value}), b"".join(pieces)
    stream = redactor.stream()
    assert b"".join([*(stream.feed(whole[i : i + 1]) for i in range(len(whole))), stream.flush()]) == redactor.redact(
        whole
    )


def test_ordinary_line_is_emitted_immediately():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    for line in (b'{"type":"assistant","text":"don\'t \\n 100%"}\n', b"plain words g\n", "naïve ghp_\n".encode()):
        assert stream.feed(line) == line
        assert stream.pending_bytes == 0


def test_only_a_possible_prefix_is_buffered():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"the token is " + TOKEN[:20].encode()) == b"the token is "
    assert stream.pending_bytes == 20
    assert stream.feed(b" no, it is not\n") == TOKEN[:20].encode() + b" no, it is not\n"
    assert stream.feed(b"now " + TOKEN[:39].encode()) == b"now "
    assert stream.feed(TOKEN[39:].encode() + b"!\n") == b"[REDACTED:TOKEN]!\n"
    assert stream.pending_bytes == 0


LARGE = system_secrets.token_urlsafe(24_000)
"""A value of 32 KB."""


def with_escapes(value: str) -> bytes:
    return b"".join(bytes([letter]) + b"\x1b[0m\x1b[1m" for letter in value.encode())


@pytest.fixture(scope="module")
def large_secret_redactor() -> SecretRedactor:
    return SecretRedactor({"LARGE": LARGE})


def test_pending_data_is_not_rescanned_repeatedly(
    large_secret_redactor: SecretRedactor, monkeypatch: pytest.MonkeyPatch
):
    scanned_bytes, find = 0, Scanner.find

    def counting_find(scanner: Scanner, layers: list[DecodedLayer]) -> list[Span]:
        nonlocal scanned_bytes
        scanned_bytes += len(layers[0].data)
        return find(scanner, layers)

    monkeypatch.setattr(Scanner, "find", counting_find)
    data = with_escapes(LARGE[:8_000])
    stream = large_secret_redactor.stream()
    assert b"".join(stream.feed(data[at : at + 400]) for at in range(0, len(data), 400)) == b""
    assert stream.pending_bytes == len(data)
    assert scanned_bytes < 16 * len(data)
    assert stream.flush() == data


@pytest.mark.parametrize("step", [1000, 4096, 300_000])
@pytest.mark.parametrize("encode", [str.encode, with_escapes, lambda value: base64.b64encode(value.encode())])
def test_large_value_is_found_for_any_chunk_size(
    large_secret_redactor: SecretRedactor, step: int, encode: Callable[[str], bytes]
):
    data = b"<" + encode(LARGE) + b"> and\nsome more " + encode(LARGE[:16_000]) + b" an incomplete one\n"
    whole = large_secret_redactor.redact(data)
    assert whole.startswith(b"<[REDACTED:LARGE]")
    assert redact_chunked(large_secret_redactor, data, list(range(0, len(data), step))) == whole


def test_text_after_a_large_prefix_is_emitted_by_a_line_flush(large_secret_redactor: SecretRedactor):
    stream = large_secret_redactor.stream()
    assert stream.feed(LARGE[:22_000].encode()) == b""
    assert stream.feed(b"!\n$ ") + stream.flush_lines() == LARGE[:22_000].encode() + b"!\n$ "
    assert stream.feed(b".") + stream.flush_lines() == b"."
    assert stream.feed(LARGE[:22_000].encode()) == b""
    assert stream.feed(LARGE[22_000:27_000].encode()) + stream.flush_lines() == b""
    assert stream.feed(LARGE[27_000:].encode()) + stream.flush_lines() + stream.flush() == b"[REDACTED:LARGE]"


def test_interleaved_stdout_and_stderr_do_not_leak_a_value():
    redactor = SecretRedactor({"TOKEN": TOKEN})
    stdout, stderr = redactor.stream(), redactor.stream()
    output = b""
    for index, letter in enumerate(TOKEN.encode()):
        output += stdout.feed(bytes([letter])) + stderr.feed(b"noise %d\n" % index)
    output += stdout.flush() + stderr.flush()
    assert b"[REDACTED:TOKEN]" in output
    assert TOKEN[:4].encode() not in output


def test_pending_bytes_are_bounded():
    redactor = SecretRedactor({"TOKEN": TOKEN})
    stream = redactor.stream()
    pending_max = 0
    for _ in range(2000):
        stream.feed(b"g" + b"\x1b[0m" * 50)
        pending_max = max(pending_max, stream.pending_bytes)
    assert 0 < pending_max <= 20_000


@pytest.mark.parametrize(
    "junk",
    [
        b"\\" * 5000,
        b"\x1b]" + b"x" * 5000,
        b"%" * 5000,
        b"'" * 5000,
        b"\x1b[" + b"1" * 5000,
    ],
)
def test_unterminated_escapes_are_emitted(junk: bytes):
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    output = stream.feed(junk)
    assert stream.pending_bytes <= 1200
    assert output + stream.flush() == junk


def test_repeated_self_overlapping_value_is_replaced_once():
    redactor = SecretRedactor({"LOOP": "abababab"})
    stream = redactor.stream()
    output = b"".join(stream.feed(b"ab") for _ in range(5000)) + stream.flush()
    assert output == redactor.redact(b"ab" * 5000) == b"[REDACTED:LOOP]"


@pytest.mark.parametrize("value", ['0000123"A0000123', '{"a":{"a":"b"}}', 'ab"ab"ab"ab"'])
def test_redaction_of_a_self_overlapping_quoted_value_does_not_depend_on_chunking(value: str):
    redactor, data = SecretRedactor({"S": value}), value.encode()
    assert redact_chunked(redactor, data, list(range(len(data)))) == redactor.redact(data)
    assert redact_chunked(redactor, data * 3, list(range(len(data) * 3))) == redactor.redact(data * 3)


def test_overlapping_values_are_both_redacted():
    redactor = SecretRedactor({"FIRST": "abcdefgh12345678", "SECOND": "12345678zyxwvuts"})
    assert redactor.redact(b"<abcdefgh12345678zyxwvuts>") == b"<[REDACTED:FIRST]>"


def test_line_flush_retains_lines_that_may_start_wrapped_base64():
    code = base64.b64encode(b"password=" + TOKEN.encode() * 2).decode()
    first, second = code[:40], code[40:]
    stream = SecretRedactor({"TOKEN": TOKEN * 2}).stream()
    output = stream.feed(f"text\n{first}\n".encode()) + stream.flush_lines()
    assert output.startswith(b"text\n")
    assert stream.flush_lines() == b""
    output += stream.feed(f"{second}\nand so on\n".encode()) + stream.flush_lines()
    before, _, after = output.partition(b"[REDACTED:TOKEN]")
    assert before == b"text\n" + base64.b64encode(b"password=")
    assert after.endswith(b"\nand so on\n")
    assert len(after) < len("\nand so on\n") + 8


@pytest.mark.parametrize("letters_per_line", [1, 4, 8, 20])
@pytest.mark.parametrize("encode", [base64.b64encode, lambda value: value.hex().encode()], ids=["base64", "hex"])
def test_encoded_value_is_found_if_its_lines_arrive_with_pauses(
    encode: Callable[[bytes], bytes], letters_per_line: int
):
    code = encode(TOKEN.encode()).decode()
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    output = b""
    for start in range(0, len(code), letters_per_line):
        line = code[start : start + letters_per_line]
        output += stream.feed(f"{line}\n".encode()) + stream.flush_lines()
    output += stream.feed(b"end\n") + stream.flush_lines()
    shown = output.replace(b"\n", b"").removesuffix(b"end").replace(b"[REDACTED:TOKEN]", b"")
    assert len(shown) <= 7 + 4


def test_multi_line_value_is_found_if_its_lines_arrive_with_pauses():
    lines = [f"short-{number}" for number in range(8)]
    stream = SecretRedactor({"LINES": "\n".join(lines)}).stream()
    output = b"".join(stream.feed(f"{line}\n".encode()) + stream.flush_lines() for line in [*lines, "end"])
    assert output == b"[REDACTED:LINES]\nend\n"


def test_line_flush_emits_lines_that_only_resemble_a_value():
    code = base64.b64encode(TOKEN.encode()).decode()
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(f"{code[:7]}\n".encode()) + stream.flush_lines() == f"{code[:7]}\n".encode()
    assert stream.feed(f"! {code[:20]}\n".encode()) + stream.flush_lines() == b"! "
    assert stream.feed(b"$ ") == f"{code[:20]}\n$ ".encode()


def test_line_flush_retains_a_partial_line():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"Password? " + TOKEN[:30].encode()) == b"Password? "
    assert stream.flush_lines() == b""
    assert stream.feed(TOKEN[30:].encode() + b"\n") + stream.flush_lines() == b"[REDACTED:TOKEN]\n"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["g", "h", "gh\n", "Z2\n", "\n", "ghp_aB\n", "text\n", "\\"]), max_size=30), st.data())
def test_line_flush_does_not_change_text_without_a_value(pieces: list[str], data: st.DataObject):
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    output = b""
    for piece in pieces:
        output += stream.feed(piece.encode())
        if data.draw(st.booleans()):
            output += stream.flush_lines()
            assert b"\n" not in stream._pending[stream._emitted :]
    assert output + stream.flush() == "".join(pieces).encode()


def test_flush_emits_all_pending_data():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"Password? g") == b"Password? "
    assert stream.flush() == b"g"
    assert stream.flush() == b""


def test_redactor_without_secrets_does_not_change_a_stream():
    stream = SecretRedactor({}).stream()
    assert stream.feed(b"ghp_\x1b[") == b"ghp_\x1b["
    assert not stream.has_redacted


@example(seed=1)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_contains_method_finds_a_value_across_chunks(seed: int):
    rng = random.Random(seed)
    redactor = SecretRedactor({"TOKEN": TOKEN})
    clean = rng.randbytes(5000)
    dirty = clean + json.dumps(TOKEN).encode() + rng.randbytes(100)
    chunked = [dirty[start : start + 37] for start in range(0, len(dirty), 37)]
    assert redactor.contains(chunked)
    assert not redactor.contains([clean, TOKEN[:-1].encode(), b" ", TOKEN[2:].encode()])
