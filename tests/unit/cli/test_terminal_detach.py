"""Detection of the detach keys in terminal input."""

import click
import pytest

from sandbox.cli.terminal import DetachKeyDetector, parse_detach_keys


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
