"""Output is split into lines of limited length without loss."""

import re
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from sandbox.runner.agent_output import LineJoiner, LineSplitter


def split(chunks, line_bytes_max=1024):
    splitter = LineSplitter(line_bytes_max)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return pieces + list(splitter.flush())


def test_line_is_emitted_when_it_is_complete():
    splitter = LineSplitter()
    assert list(splitter.feed(b"hel")) == []
    assert list(splitter.feed(b"lo\nwor")) == [(b"hello\n", False)]
    assert list(splitter.flush()) == [(b"wor", False)]


def test_line_over_the_limit_is_emitted_in_marked_parts():
    assert split([b"abcdefgh\nij\n"], line_bytes_max=3) == [
        (b"abc", True),
        (b"def", True),
        (b"gh\n", False),
        (b"ij\n", False),
    ]


def test_stream_that_ends_at_the_limit_is_emitted_in_full():
    splitter = LineSplitter(3)
    assert list(splitter.feed(b"abc")) == []
    assert list(splitter.flush()) == [(b"abc", False)]
    assert list(splitter.flush()) == []


def test_unterminated_line_is_emitted_in_parts():
    splitter = LineSplitter(10)
    pieces = [piece for _ in range(100) for piece in splitter.feed(b"x" * 7)]
    assert sum(len(piece) for piece, _ in pieces) >= 690
    assert all(is_continued for _, is_continued in pieces)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_joined_pieces_are_equal_to_the_stream(chunks, line_bytes_max):
    pieces = split(chunks, line_bytes_max)
    assert b"".join(piece for piece, _ in pieces) == b"".join(chunks)
    assert all(len(piece) <= line_bytes_max for piece, _ in pieces)
    assert all(b"\n" not in piece[:-1] for piece, _ in pieces)


@given(st.binary(max_size=200), st.integers(1, 9))
def test_chunk_boundaries_do_not_change_the_lines(data, size):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    whole = [line for line in split([data]) if line[0]]
    assert split(chunks) == whole


def join(pieces, line_bytes_max):
    joiner = LineJoiner(line_bytes_max)
    return [line for piece in pieces if (line := joiner.feed(*piece)) is not None]


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20), st.integers(1, 60))
def test_split_lines_are_joined_up_to_the_limit(chunks, line_bytes_max, joined_bytes_max):
    joined = join(split(chunks, line_bytes_max), joined_bytes_max)
    lines = re.findall(rb"[^\n]*\n|[^\n]+", b"".join(chunks))
    assert joined == [line for line in lines if len(line) <= joined_bytes_max]


def test_line_over_the_join_limit_is_not_buffered():
    joiner = LineJoiner(256 * 1024)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert joiner.feed(b"x" * 64 * 1024, is_continued=True) is None
        now_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now_bytes < 64 * 1024
    assert peak_bytes < 512 * 1024
    assert joiner.feed(b"\n", is_continued=False) is None
    assert joiner.feed(b"next\n", is_continued=False) == b"next\n"
