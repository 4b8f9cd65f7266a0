"""Finds any of many needles at a speed that does not depend on how many there are.

Every needle has at least seven bytes, so wherever it stands, it covers one whole word of four bytes at a multiple of
four. The words of the text are looked up in a set; only where one is known is a needle compared. A needle is known by
words that few others have, so that lines of one value that are alike are not compared one after the other.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
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


def _words(text: bytes, first: int = 0) -> "memoryview[int]":
    """The word at `first`, and those behind it."""
    return memoryview(text)[first : len(text) - (len(text) - first) % _WORD_BYTES].cast("I")


def _telling(words: "memoryview[int]", known: Mapping[int, Sequence[object]]) -> int:
    """Which of the words the fewest needles are known by.

    Beginnings and ends are what secrets have in common with other text; the middle tells more, where it is free.
    """
    middle = len(words) // 2
    if words[middle] not in known:
        return middle
    step = -(-len(words) // _CANDIDATES_MAX)
    candidates = words[::step].tolist()
    best = next(filterfalse(known.__contains__, candidates), None)
    if best is None:
        best = min(candidates, key=lambda word: len(known[word]))
    return candidates.index(best) * step


class Search:
    """Searches for a fixed set of needles."""

    def __init__(self, needles: Iterable[Needle]) -> None:
        known: dict[int, list[tuple[Needle, int]]] = defaultdict(list)
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
                words = _words(text, first)
                index = _telling(words, known)
                known[words[index]].append((needle, first + index * _WORD_BYTES))
        self._words, self._known = dict(known), frozenset(known)
        self._beginnings, self._inner = dict(beginnings), frozenset(inner)

    def find(self, text: bytes) -> Iterator[Hit]:
        """Every place of every needle."""
        words = _words(text)
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
