"""Output comes out by line, whole up to a bound, and nothing of it is lost."""

from hypothesis import given
from hypothesis import strategies as st

from sandbox.runner.lines import LineSplitter


def split(chunks, line_bytes_max=1024):
    splitter = LineSplitter(line_bytes_max)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return pieces + list(splitter.end())


def test_a_line_comes_when_it_is_whole():
    splitter = LineSplitter()
    assert list(splitter.feed(b"hel")) == []
    assert list(splitter.feed(b"lo\nwor")) == [(b"hello\n", False)]
    assert list(splitter.end()) == [(b"wor", False)]


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
    assert list(splitter.end()) == [(b"abc", False)]
    assert list(splitter.end()) == []


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
