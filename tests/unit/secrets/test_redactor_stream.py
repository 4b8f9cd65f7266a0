"""A stream is redacted as if it had come in one piece, however it is cut, and waits no longer than it must."""

import base64
import json
import random
import secrets as secrets_of_the_system
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from doubles.redaction_attacks import VALUES, attack, texts, values
from sandbox.secrets.decoders import DecodedLayer
from sandbox.secrets.redactor import SecretRedactor
from sandbox.secrets.scanner import Scanner, Span

TOKEN = "ghp_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6"


def streamed(redactor: SecretRedactor, data: bytes, cuts: list[int]) -> bytes:
    stream = redactor.stream()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join([*(stream.feed(data[start:end]) for start, end in pairwise(places)), stream.flush()])


@settings(max_examples=120, deadline=None)
@given(st.lists(values, min_size=1, max_size=3), st.data())
def test_every_cutting_gives_what_the_whole_gives(secrets: list[str], data: st.DataObject):
    redactor = SecretRedactor({f"S{index}": value for index, value in enumerate(secrets)})
    for _ in range(2):
        pieces = data.draw(st.lists(texts | st.sampled_from(secrets).flatmap(attack), max_size=5))
        whole = b"".join(pieces)
        redacted = redactor.redact(whole)
        for cuts in data.draw(st.lists(st.lists(st.integers(0, 1 << 16), max_size=12), min_size=1, max_size=3)):
            assert streamed(redactor, whole, cuts) == redacted


# What is held is looked at with every byte of it: 3 KB of nested escapes take 8 s.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.sampled_from(VALUES)
    .flatmap(lambda value: st.tuples(st.just(value), texts, attack(value), texts))
    .filter(lambda story: sum(map(len, story[1:])) <= 600)
)
def test_a_byte_at_a_time(story: tuple[str, bytes, bytes, bytes]):
    value, *pieces = story
    redactor, whole = SecretRedactor({"S": value}), b"".join(pieces)
    stream = redactor.stream()
    assert b"".join([*(stream.feed(whole[i : i + 1]) for i in range(len(whole))), stream.flush()]) == redactor.redact(
        whole
    )


def test_an_ordinary_line_is_let_go_at_once():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    for line in (b'{"type":"assistant","text":"don\'t \\n 100%"}\n', b"plain words g\n", "naïve ghp_\n".encode()):
        assert stream.feed(line) == line
        assert stream.pending_bytes == 0


def test_only_what_may_be_a_beginning_is_held_back():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"the token is " + TOKEN[:20].encode()) == b"the token is "
    assert stream.pending_bytes == 20
    assert stream.feed(b" no, it is not\n") == TOKEN[:20].encode() + b" no, it is not\n"
    assert stream.feed(b"now " + TOKEN[:39].encode()) == b"now "
    assert stream.feed(TOKEN[39:].encode() + b"!\n") == b"[REDACTED:TOKEN]!\n"
    assert stream.pending_bytes == 0


LARGE = secrets_of_the_system.token_urlsafe(24_000)
"""A value of 32 KB."""


def noisily(value: str) -> bytes:
    return b"".join(bytes([letter]) + b"\x1b[0m\x1b[1m" for letter in value.encode())


@pytest.fixture(scope="module")
def large() -> SecretRedactor:
    return SecretRedactor({"LARGE": LARGE})


def test_what_is_held_is_not_looked_at_over_and_over(large: SecretRedactor, monkeypatch: pytest.MonkeyPatch):
    looked_at, find = 0, Scanner.find

    def counted(scanner: Scanner, layers: list[DecodedLayer]) -> list[Span]:
        nonlocal looked_at
        looked_at += len(layers[0].data)
        return find(scanner, layers)

    monkeypatch.setattr(Scanner, "find", counted)
    said = noisily(LARGE[:8_000])
    stream = large.stream()
    assert b"".join(stream.feed(said[at : at + 400]) for at in range(0, len(said), 400)) == b""
    assert stream.pending_bytes == len(said)
    assert looked_at < 16 * len(said)
    assert stream.flush() == said


@pytest.mark.parametrize("step", [1000, 4096, 300_000])
@pytest.mark.parametrize("write", [str.encode, noisily, lambda value: base64.b64encode(value.encode())])
def test_a_large_value_is_found_however_it_is_cut(large: SecretRedactor, step: int, write: Callable[[str], bytes]):
    said = b"<" + write(LARGE) + b"> and\nsome more " + write(LARGE[:16_000]) + b" that is none\n"
    whole = large.redact(said)
    assert whole.startswith(b"<[REDACTED:LARGE]")
    assert streamed(large, said, list(range(0, len(said), step))) == whole


def test_what_follows_a_large_beginning_is_let_go_at_a_pause(large: SecretRedactor):
    stream = large.stream()
    assert stream.feed(LARGE[:22_000].encode()) == b""
    assert stream.feed(b"!\n$ ") + stream.flush_lines() == LARGE[:22_000].encode() + b"!\n$ "
    assert stream.feed(b".") + stream.flush_lines() == b"."
    assert stream.feed(LARGE[:22_000].encode()) == b""
    assert stream.feed(LARGE[22_000:27_000].encode()) + stream.flush_lines() == b""
    assert stream.feed(LARGE[27_000:].encode()) + stream.flush_lines() + stream.flush() == b"[REDACTED:LARGE]"


def test_stdout_and_stderr_between_each_other_do_not_help():
    redactor = SecretRedactor({"TOKEN": TOKEN})
    stdout, stderr = redactor.stream(), redactor.stream()
    shown = b""
    for index, letter in enumerate(TOKEN.encode()):
        shown += stdout.feed(bytes([letter])) + stderr.feed(b"noise %d\n" % index)
    shown += stdout.flush() + stderr.flush()
    assert b"[REDACTED:TOKEN]" in shown
    assert TOKEN[:4].encode() not in shown


def test_what_is_held_back_is_bounded():
    redactor = SecretRedactor({"TOKEN": TOKEN})
    stream = redactor.stream()
    most = 0
    for _ in range(2000):
        stream.feed(b"g" + b"\x1b[0m" * 50)
        most = max(most, stream.pending_bytes)
    assert 0 < most <= 20_000


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
def test_escapes_that_never_end_are_let_go(junk: bytes):
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    gone = stream.feed(junk)
    assert stream.pending_bytes <= 1200
    assert gone + stream.flush() == junk


def test_a_value_that_overlaps_itself_without_end_is_one_mark():
    redactor = SecretRedactor({"LOOP": "abababab"})
    stream = redactor.stream()
    gone = b"".join(stream.feed(b"ab") for _ in range(5000)) + stream.flush()
    assert gone == redactor.redact(b"ab" * 5000) == b"[REDACTED:LOOP]"


@pytest.mark.parametrize("value", ['0000123"A0000123', '{"a":{"a":"b"}}', 'ab"ab"ab"ab"'])
def test_a_value_with_quotes_that_overlaps_itself_gives_the_same_in_pieces(value: str):
    redactor, said = SecretRedactor({"S": value}), value.encode()
    assert streamed(redactor, said, list(range(len(said)))) == redactor.redact(said)
    assert streamed(redactor, said * 3, list(range(len(said) * 3))) == redactor.redact(said * 3)


def test_two_values_that_overlap_both_vanish():
    redactor = SecretRedactor({"FIRST": "abcdefgh12345678", "SECOND": "12345678zyxwvuts"})
    assert redactor.redact(b"<abcdefgh12345678zyxwvuts>") == b"<[REDACTED:FIRST]>"


def test_after_a_pause_whole_lines_are_let_go_and_remembered():
    code = base64.b64encode(b"password=" + TOKEN.encode() * 2).decode()
    first, second = code[:40], code[40:]
    stream = SecretRedactor({"TOKEN": TOKEN * 2}).stream()
    begin = stream.feed(f"{first}\n".encode())
    assert begin + stream.flush_lines() == f"{first}\n".encode()
    assert (stream.pending_bytes, stream.flush_lines()) == (0, b"")
    rest = stream.feed(f"{second}\nand so on\n".encode()) + stream.flush_lines()
    assert rest.endswith(b"\nand so on\n")
    assert len(rest) < len("\nand so on\n") + 8
    assert stream.has_redacted


def test_a_pause_within_a_line_lets_nothing_go():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"Password? " + TOKEN[:30].encode()) == b"Password? "
    assert stream.flush_lines() == b""
    assert stream.feed(TOKEN[30:].encode() + b"\n") + stream.flush_lines() == b"[REDACTED:TOKEN]\n"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["g", "h", "gh\n", "Z2\n", "\n", "ghp_aB\n", "text\n", "\\"]), max_size=30), st.data())
def test_pauses_change_nothing_where_no_value_stands(pieces: list[str], data: st.DataObject):
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    gone = b""
    for piece in pieces:
        gone += stream.feed(piece.encode())
        if data.draw(st.booleans()):
            gone += stream.flush_lines()
            assert b"\n" not in stream._pending[stream._emitted :]
    assert gone + stream.flush() == "".join(pieces).encode()


def test_the_end_lets_everything_go():
    stream = SecretRedactor({"TOKEN": TOKEN}).stream()
    assert stream.feed(b"Password? g") == b"Password? "
    assert stream.flush() == b"g"
    assert stream.flush() == b""


def test_without_secrets_everything_passes():
    stream = SecretRedactor({}).stream()
    assert stream.feed(b"ghp_\x1b[") == b"ghp_\x1b["
    assert not stream.has_redacted


@example(seed=1)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_files_are_looked_through_across_the_borders_of_chunks(seed: int):
    rng = random.Random(seed)
    redactor = SecretRedactor({"TOKEN": TOKEN})
    clean = rng.randbytes(5000)
    dirty = clean + json.dumps(TOKEN).encode() + rng.randbytes(100)
    chunked = [dirty[start : start + 37] for start in range(0, len(dirty), 37)]
    assert redactor.contains(chunked)
    assert not redactor.contains([clean, TOKEN[:-1].encode(), b" ", TOKEN[2:].encode()])
