"""Output comes out by line, whole up to a bound, and nothing of it is lost."""

import re
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from sandbox.runner.agent_output import LineJoiner, LineSplitter


def split(chunks, line_bytes_max=1024):
    splitter = LineSplitter(line_bytes_max)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return pieces + list(splitter.flush())


def test_a_line_comes_when_it_is_whole():
    splitter = LineSplitter()
    assert list(splitter.feed(b"hel")) == []
    assert list(splitter.feed(b"lo\nwor")) == [(b"hello\n", False)]
    assert list(splitter.flush()) == [(b"wor", False)]


def test_a_line_over_the_bound_comes_in_marked_parts():
    assert split([b"abcdefgh\nij\n"], line_bytes_max=3) == [
        (b"abc", True),
        (b"def", True),
        (b"gh\n", False),
        (b"ij\n", False),
    ]


def test_a_stream_that_ends_at_the_bound_has_no_part_missing():
    splitter = LineSplitter(3)
    assert list(splitter.feed(b"abc")) == []
    assert list(splitter.flush()) == [(b"abc", False)]
    assert list(splitter.flush()) == []


def test_a_line_without_end_does_not_grow_in_memory():
    splitter = LineSplitter(10)
    pieces = [piece for _ in range(100) for piece in splitter.feed(b"x" * 7)]
    assert sum(len(piece) for piece, _ in pieces) >= 690
    assert all(continued for _, continued in pieces)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_the_pieces_are_the_stream(chunks, line_bytes_max):
    pieces = split(chunks, line_bytes_max)
    assert b"".join(piece for piece, _ in pieces) == b"".join(chunks)
    assert all(len(piece) <= line_bytes_max for piece, _ in pieces)
    assert all(b"\n" not in piece[:-1] for piece, _ in pieces)


@given(st.binary(max_size=200), st.integers(1, 9))
def test_the_cut_of_the_chunks_changes_nothing(data, size):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    whole = [line for line in split([data]) if line[0]]
    assert split(chunks) == whole


def join(pieces, line_bytes_max):
    joiner = LineJoiner(line_bytes_max)
    return [line for piece in pieces if (line := joiner.feed(*piece)) is not None]


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20), st.integers(1, 60))
def test_lines_that_were_split_are_listened_to_whole_up_to_a_bound(chunks, line_bytes_max, heard_bytes_max):
    heard = join(split(chunks, line_bytes_max), heard_bytes_max)
    lines = re.findall(rb"[^\n]*\n|[^\n]+", b"".join(chunks))
    assert heard == [line for line in lines if len(line) <= heard_bytes_max]


def test_nothing_is_kept_of_a_line_that_is_too_long_to_be_listened_to():
    joiner = LineJoiner(256 * 1024)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert joiner.feed(b"x" * 64 * 1024, continued=True) is None
        now_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now_bytes < 64 * 1024
    assert peak_bytes < 512 * 1024
    assert joiner.feed(b"\n", continued=False) is None
    assert joiner.feed(b"next\n", continued=False) == b"next\n"
