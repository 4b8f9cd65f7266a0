"""A journal is not much larger than the output in it, whatever that is made of."""

import random
from datetime import UTC, datetime

import pytest

from sandbox.journal.record_format import decode, encode
from sandbox.model.events import Output, Record

SIZE = 100_000


def line_of(output):
    return encode(Record(seq=1, epoch=1, at=datetime(2026, 1, 29, tzinfo=UTC), event=output))


@pytest.mark.parametrize(
    "piece",
    [b"\x01", b"\0\0\0a", b"\x1b[0m\x01\x02\x03", b'"', b"\\", b"\t\n", "ä\x02\x03".encode(), b"\xff\x01"],
    ids=repr,
)
def test_output_takes_at_most_twice_its_bytes(piece):
    data = (piece * SIZE)[:SIZE] if piece.isascii() else piece * (SIZE // len(piece))
    output = Output.from_bytes("stdout", data)
    line = line_of(output)
    assert len(line) < 2 * len(data) + 200
    assert decode(line).event == output
    assert output.data == data
    assert output.display_text == data.decode(errors="replace")


@pytest.mark.parametrize(
    "data",
    [
        b"plain text\n",
        b"\n",
        b"\x1b[32mPASSED\x1b[0m tests/test_one.py\r\n",
        b'{"type":"assistant","text":"a \\"quoted\\" word"}\n',
        "Grüße 😀\t\n".encode(),
    ],
    ids=repr,
)
def test_ordinary_output_is_kept_as_text_that_people_can_search(data):
    assert Output.from_bytes("stdout", data).text == data.decode()


def test_any_output_comes_back_byte_for_byte():
    chance = random.Random(7)
    for _ in range(500):
        data = bytes(chance.choices(range(128), k=chance.randrange(40)))
        output = decode(line_of(Output.from_bytes("stderr", data))).event
        assert isinstance(output, Output)
        assert (output.data, output.display_text) == (data, data.decode())
