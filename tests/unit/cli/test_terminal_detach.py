"""The keys that leave a terminal, found among all that is typed."""

import click
import pytest

from sandbox.cli.terminal import DetachKeyDetector, parse_detach_keys


def parse(value: str) -> bytes:
    command = click.Command("x")
    return parse_detach_keys(click.Context(command), click.Option(["--detach-keys"]), value)


@pytest.mark.parametrize(
    ("written", "keys"), [("ctrl-p,ctrl-q", b"\x10\x11"), ("ctrl-],q", b"\x1dq"), ("a", b"a"), ("ctrl-@", b"\0")]
)
def test_keys_are_written_as_docker_writes_them(written: str, keys: bytes):
    assert parse(written) == keys


@pytest.mark.parametrize("written", ["", "ctrl-", "ctrl-1", "ab", "ctrl-p,,ctrl-q", "strg-p"])
def test_what_is_no_key_is_refused(written: str):
    with pytest.raises(click.BadParameter, match="write keys as"):
        parse(written)


def typed(*chunks: bytes) -> tuple[bytes, bool]:
    detaching, sent = DetachKeyDetector(b"\x10\x11"), b""
    for chunk in chunks:
        data, detaches = detaching.feed(chunk)
        sent += data
        if detaches:
            return sent, True
    return sent, False


@pytest.mark.parametrize("chunks", [(b"ls\x10\x11rest",), (b"ls\x10", b"\x11"), (b"ls", b"\x10", b"\x11")])
def test_they_are_found_however_they_arrive(chunks: tuple[bytes, ...]):
    assert typed(*chunks) == (b"ls", True)


def test_a_first_key_alone_goes_on_with_what_follows():
    assert typed(b"\x10", b"x\x10\x10", b"y") == (b"\x10x\x10\x10y", False)
