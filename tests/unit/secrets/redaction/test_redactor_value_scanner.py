"""Similar patterns are indexed by words that only a few patterns share. Each pattern is found at any position."""

import sys

from hypothesis import given
from hypothesis import strategies as st

from sandbox.secrets.redaction.redactor import MultiPatternSearch
from sandbox.secrets.redaction.value_patterns import SecretPattern

PATTERNS = [f"node{number:04d}.internal.example.com:secretpw{number:04d}".encode() for number in range(1200)]


def create_search(*patterns: bytes) -> MultiPatternSearch:
    return MultiPatternSearch(SecretPattern(pattern, f"N{number}") for number, pattern in enumerate(patterns))


def test_patterns_with_a_common_middle_are_indexed_selectively():
    patterns_by_word = create_search(*PATTERNS)._patterns_by_word
    middle = b"".join(PATTERNS[0][9:36] for _ in range(4))
    words = {int.from_bytes(middle[at : at + 4], sys.byteorder) for at in range(len(middle) - 3)}
    assert sum(len(patterns_by_word.get(word, ())) for word in words) < len(PATTERNS) / 4
    assert max(map(len, patterns_by_word.values())) < len(PATTERNS) / 10


@given(st.sampled_from(PATTERNS), st.binary(max_size=9), st.binary(max_size=9))
def test_each_pattern_is_found_at_every_position(pattern: bytes, before: bytes, after: bytes):
    matches = [(match.start, match.end) for match in PATTERN_SEARCH.find(before + pattern + after)]
    assert (len(before), len(before) + len(pattern)) in matches


@given(st.lists(st.binary(min_size=7, max_size=80), min_size=1, max_size=20), st.integers(0, 7), st.data())
def test_each_of_many_patterns_is_found(patterns: list[bytes], offset: int, data: st.DataObject):
    pattern = data.draw(st.sampled_from(patterns))
    matches = [match.start for match in create_search(*patterns).find(b"\0" * offset + pattern + b"\0" * 7)]
    assert offset in matches


PATTERN_SEARCH = create_search(*PATTERNS)
