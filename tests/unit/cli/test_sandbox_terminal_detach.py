"""Detection of the detach keys in terminal input."""

import re

import click
import pytest

from sandbox.cli import sandbox_terminal
from sandbox.cli.sandbox_terminal import DetachKeyDetector, parse_detach_keys


def parse(value: str) -> bytes:
    command = click.Command("x")
    return parse_detach_keys(click.Context(command), click.Option(["--detach-keys"]), value)


@pytest.mark.parametrize(
    ("text", "keys"), [("ctrl-p,ctrl-q", b"\x10\x11"), ("ctrl-],q", b"\x1dq"), ("a", b"a"), ("ctrl-@", b"\0")]
)
def test_detach_keys_use_the_syntax_of_docker(text: str, keys: bytes):
    assert parse(text) == keys


@pytest.mark.parametrize("text", ["", "ctrl-", "ctrl-1", "ab", "ctrl-p,,ctrl-q", "strg-p"])
def test_invalid_key_is_rejected(text: str):
    with pytest.raises(click.BadParameter, match="write keys as"):
        parse(text)


def feed_chunks(*chunks: bytes) -> tuple[bytes, bool]:
    detector, sent = DetachKeyDetector(b"\x10\x11"), b""
    for chunk in chunks:
        data, detaches = detector.feed(chunk)
        sent += data
        if detaches:
            return sent, True
    return sent, False


@pytest.mark.parametrize("chunks", [(b"ls\x10\x11rest",), (b"ls\x10", b"\x11"), (b"ls", b"\x10", b"\x11")])
def test_keys_are_detected_across_chunks(chunks: tuple[bytes, ...]):
    assert feed_chunks(*chunks) == (b"ls", True)


def test_partial_sequence_is_passed_on():
    assert feed_chunks(b"\x10", b"x\x10\x10", b"y") == (b"\x10x\x10\x10y", False)


@pytest.mark.parametrize(
    ("enabled", "reset"),
    [
        (b"\x1b[?9h", rb"\x1b\[\?([0-9]+;)*9(;[0-9]+)*l"),  # mouse reporting
        (b"\x1b[?1001h", rb"\x1b\[\?([0-9]+;)*1001(;[0-9]+)*l"),
        (b"\x1b[?1003h", rb"\x1b\[\?([0-9]+;)*1003(;[0-9]+)*l"),
        (b"\x1b[?2004h", rb"\x1b\[\?([0-9]+;)*2004(;[0-9]+)*l"),
        (b"\x1b[?2031h", rb"\x1b\[\?([0-9]+;)*2031(;[0-9]+)*l"),  # color scheme reporting
        (b"\x1b[?9001h", rb"\x1b\[\?([0-9]+;)*9001(;[0-9]+)*l"),  # keys reported as sequences
        (b"\x1b[>4;2m", rb"\x1b\[>4m"),  # Ctrl-C reported as a sequence
        (b"\x1b[>1u\x1b[>1u", rb"\x1b\[<99u"),
        (b"\x1b[2h", rb"\x1b\[2(;[0-9]+)*l"),  # keyboard lock
        (b"\x1b[12l", rb"\x1b\[12h"),  # local echo
        (b"\x1b[?7l", rb"\x1b\[\?7(;[0-9]+)*h"),
        (b"\x1b[5;6r", rb"\x1b\[r"),
        (b"\x1b[?6h", rb"\x1b\[\?6(;[0-9]+)*l"),
        (b"\x1b[5i", rb"\x1b\[4i"),  # output to a printer
        (b"\x1b(0\x0e", rb"\x0f\x1b\(B"),  # line drawing characters instead of letters
        (b"\x1b]8;;https://example.org\x1b\\", rb"\x1b\]8;;\x1b\\"),
        (b"\x1bP+q", rb"^\x18\x1b\x03\x1b\\"),  # a string, which some terminals end only at its terminator
        (b"\x1b[?38h", rb"^\x18\x1b\x03"),  # Tektronix mode
        (b"\x1bP0;1|17/6c730a\x1b\\", rb"\x1bP0;1\|\x1b\\"),  # a key that types a command line
        (b"\x1b[?1061h", rb"\x1b\[\?([0-9]+;)*1061(;[0-9]+)*l"),  # the keyboard of a VT220
        (b"\x1b[?8l", rb"\x1b\[\?([0-9]+;)*8(;[0-9]+)*h"),  # keys that do not repeat
        (b"\x1b[5 q", rb"\x1b\[0 q"),  # the shape of the cursor
        (b"\x1b G", rb"\x1b F"),  # replies of 8-bit characters
        (b"\x1b[?67h", rb"\x1b\[\?([0-9]+;)*67(;[0-9]+)*l"),  # the backspace key
        (b"\x1b%@", rb"\x1b%G"),  # Latin-1 instead of UTF-8
        (b"\x1b[?2l", rb"^\x18\x1b\x03\x1b\\\x1b<"),  # VT52 mode, which has other sequences
    ],
)
def test_terminal_mode_that_a_program_has_set_is_reset(enabled: bytes, reset: bytes):
    assert re.search(reset, sandbox_terminal._RESET) is not None, enabled


@pytest.mark.parametrize(("term", "is_passed_on"), [("screen.xterm-256color", True), ("xterm", False), (None, False)])
def test_terminal_around_gnu_screen_is_reset_too(term, is_passed_on):
    sequence = sandbox_terminal._reset_sequence({} if term is None else {"TERM": term})
    assert sequence.startswith(sandbox_terminal._RESET)
    rest = sequence.removeprefix(sandbox_terminal._RESET)
    assert bool(re.fullmatch(rb"\x1bP\x1b%G[^\\]*1003l[^\\]*\x1b\\", rest)) is is_passed_on
    assert bool(rest) is is_passed_on


def test_reset_does_not_clear_the_screen():
    assert re.search(rb"\x1bc|\x1b\[[0-9]*J", sandbox_terminal._RESET) is None


@pytest.mark.parametrize(
    ("keys", "shown"), [(b"\x10\x11", "Ctrl-P Ctrl-Q"), (b"\x1d", "Ctrl-]"), (b"\x00a", "Ctrl-@ a"), (b"~.", "~ .")]
)
def test_keys_are_shown_in_readable_form(keys: bytes, shown: str):
    assert sandbox_terminal.format_keys(keys) == shown
