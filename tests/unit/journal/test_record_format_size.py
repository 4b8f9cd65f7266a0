"""The encoded size of output is bounded for any content."""

import random
from datetime import UTC, datetime

import pytest

from sandbox.journal.record_format import decode, encode
from sandbox.model.events import Output, Record

SIZE = 100_000


def encode_output(output):
    return encode(Record(seq=1, epoch=1, at=datetime(2026, 1, 29, tzinfo=UTC), event=output))


@pytest.mark.parametrize(
    "piece",
    [b"\x01", b"\0\0\0a", b"\x1b[0m\x01\x02\x03", b'"', b"\\", b"\t\n", "ä\x02\x03".encode(), b"\xff\x01"],
    ids=repr,
)
def test_encoded_output_has_at_most_twice_its_bytes(piece):
    data = (piece * SIZE)[:SIZE] if piece.isascii() else piece * (SIZE // len(piece))
    output = Output.from_bytes("stdout", data)
    line = encode_output(output)
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
def test_ordinary_output_is_stored_as_searchable_text(data):
    assert Output.from_bytes("stdout", data).text == data.decode()


def test_any_output_is_unchanged_by_encoding_and_decoding():
    rng = random.Random(7)
    for _ in range(500):
        data = bytes(rng.choices(range(128), k=rng.randrange(40)))
        output = decode(encode_output(Output.from_bytes("stderr", data))).event
        assert isinstance(output, Output)
        assert (output.data, output.display_text) == (data, data.decode())
