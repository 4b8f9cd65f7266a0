"""Finds any of many needles at a speed that does not depend on how many there are.

Every needle has at least seven bytes, so wherever it stands, it covers one whole word of four bytes at a multiple of
four. The words of the text are looked up in a set; only where one is known is a needle compared. A needle is known by
words that few others have, so that lines of one value that are alike are not compared one after the other.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sandbox.secrets.needles import Needle

_WORD_BYTES = 4
_CANDIDATES_MAX = 16
"""Words of a needle that are looked at, of each of the four places that it may have."""


class Hit(NamedTuple):
    """A stretch in which a needle stands."""

    start: int
    end: int
    name: str


def _word(text: bytes, offset: int) -> int:
    return int.from_bytes(text[offset : offset + _WORD_BYTES], sys.byteorder)


def _telling_offset(text: bytes, first: int, words: Mapping[int, Sequence[object]]) -> int:
    """Of `first` and every fourth byte behind it, where the word stands that the fewest needles are known by.

    Beginnings and ends are what secrets have in common with other text; the middle tells more, where it is free.
    """
    offsets = range(first, len(text) - _WORD_BYTES + 1, _WORD_BYTES)
    middle = offsets[len(offsets) // 2]
    if _word(text, middle) not in words:
        return middle
    candidates = offsets[:: -(-len(offsets) // _CANDIDATES_MAX)]
    return min(candidates, key=lambda offset: len(words.get(_word(text, offset), ())))


class Search:
    """Searches for a fixed set of needles."""

    def __init__(self, needles: Iterable[Needle]) -> None:
        words: dict[int, list[tuple[Needle, int]]] = defaultdict(list)
        beginnings: dict[bytes, list[bytes]] = defaultdict(list)
        inner: set[int] = set()
        self.longest = 0
        for needle in needles:
            text = needle.skeleton
            self.longest = max(self.longest, len(text))
            inner.update(text[:-1])
            for length in range(1, _WORD_BYTES + 1):
                beginnings[text[:length]].append(text)
            for first in range(_WORD_BYTES):
                offset = _telling_offset(text, first, words)
                words[_word(text, offset)].append((needle, offset))
        self._words, self._known = dict(words), frozenset(words)
        self._beginnings, self._inner = dict(beginnings), frozenset(inner)

    def find(self, text: bytes) -> Iterator[Hit]:
        """Every place of every needle."""
        words = memoryview(text)[: len(text) // _WORD_BYTES * _WORD_BYTES].cast("I")
        if self._known.isdisjoint(words):
            return
        for index, word in enumerate(words):
            if word in self._known:
                for needle, offset in self._words[word]:
                    start = index * _WORD_BYTES - offset
                    if start >= 0 and text.startswith(needle.skeleton, start):
                        yield Hit(start, start + len(needle.skeleton), needle.name)

    def may_go_on(self, text: bytes) -> bool:
        """Whether the last byte may stand within a needle; a quick answer that is no for most ends of lines."""
        return not text or text[-1] in self._inner

    def find_beginnings(self, text: bytes) -> Iterator[int]:
        """Every place from which the rest of the text is the beginning of a needle, the first one first."""
        for start in range(max(0, len(text) - self.longest + 1), len(text)):
            needles = self._beginnings.get(text[start : start + _WORD_BYTES])
            if needles is not None:
                rest = text[start:]
                if any(len(needle) > len(rest) and needle.startswith(rest) for needle in needles):
                    yield start
