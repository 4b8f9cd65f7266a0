"""Needles that are alike are told apart by a few words, wherever they stand."""

import sys

from hypothesis import given
from hypothesis import strategies as st

from sandbox.secrets.patterns import SecretPattern
from sandbox.secrets.scanner import MultiPatternSearch

HOSTS = [f"node{number:04d}.internal.example.com:secretpw{number:04d}".encode() for number in range(1200)]


def search_for(*skeletons: bytes) -> MultiPatternSearch:
    return MultiPatternSearch(SecretPattern(skeleton, f"N{number}") for number, skeleton in enumerate(skeletons))


def test_of_lines_that_share_their_middle_few_are_compared_wherever_that_middle_stands():
    known = search_for(*HOSTS)._patterns_by_word
    middle = b"".join(HOSTS[0][9:36] for _ in range(4))
    words = {int.from_bytes(middle[at : at + 4], sys.byteorder) for at in range(len(middle) - 3)}
    assert sum(len(known.get(word, ())) for word in words) < len(HOSTS) / 4
    assert max(map(len, known.values())) < len(HOSTS) / 10


@given(st.sampled_from(HOSTS), st.binary(max_size=9), st.binary(max_size=9))
def test_each_of_them_is_found_at_every_place(needle: bytes, before: bytes, after: bytes):
    found = [(hit.start, hit.end) for hit in SEARCH.find(before + needle + after)]
    assert (len(before), len(before) + len(needle)) in found


@given(st.lists(st.binary(min_size=7, max_size=80), min_size=1, max_size=20), st.integers(0, 7), st.data())
def test_any_needle_is_found_among_any_others(skeletons: list[bytes], offset: int, data: st.DataObject):
    needle = data.draw(st.sampled_from(skeletons))
    found = [hit.start for hit in search_for(*skeletons).find(b"\0" * offset + needle + b"\0" * 7)]
    assert offset in found


SEARCH = search_for(*HOSTS)
