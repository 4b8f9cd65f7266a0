"""Where in some bytes values stand, and how much of the beginning of a stream is settled."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from typing import NamedTuple

from sandbox.secrets.decoders import Layer, Skeleton, settle
from sandbox.secrets.escapes import find_beginning, step_back
from sandbox.secrets.limits import REDACTED_LAYERS_MAX, REDACTED_SPREAD_BYTES_MAX
from sandbox.secrets.patterns import Needle, make_needles

_WORD_BYTES = 4
_CANDIDATES_MAX = 16
"""Words of a needle that are looked at, of each of the four places that it may have."""


class Hit(NamedTuple):
    """A stretch in which a needle stands."""

    start: int
    end: int
    name: str


def _words(text: bytes, first: int = 0) -> memoryview[int]:
    """The word at `first`, and those behind it."""
    return memoryview(text)[first : len(text) - (len(text) - first) % _WORD_BYTES].cast("I")


def _telling(words: memoryview[int], known: Mapping[int, Sequence[object]]) -> int:
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


_GLANCE_BYTES = 64
_QUOTE = re.compile(rb'\\{0,64}+"')


class Span(NamedTuple):
    """Bytes in which a value stands; spans sort by place, of those from one place the longest first."""

    start: int
    minus_end: int
    name: str

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return -self.minus_end


class Scanner:
    """Knows the values of one task's secrets, by name. Its repr does not tell them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._kinds: list[tuple[Skeleton, Search]] = [
            (skeleton, Search(needles)) for skeleton, needles in make_needles(values) if needles
        ]
        longest = max((search.longest for _, search in self._kinds), default=0)
        spread = min(32 * longest + 4096, max(4 * longest, REDACTED_SPREAD_BYTES_MAX))
        self.span_bytes_max = spread if longest else 0
        """A value spread over more bytes, by escapes or what stands in between, is not found."""

    def find(self, layers: list[Layer]) -> list[Span]:
        """Where values stand, in order."""
        found: set[Span] = set()
        for layer in layers:
            for hit in self._find_in(layer):
                start, end = layer.origin(hit.start, hit.end)
                if end - start <= self.span_bytes_max:
                    found.add(Span(step_back(layers[0].data, start), -end, hit.name))
        return sorted(found)

    def _find_in(self, layer: Layer) -> Iterator[Hit]:
        for skeleton, search in self._kinds:
            hits = list(search.find(skeleton.of(layer.data)))
            positions = skeleton.positions(layer.data) if hits else ()
            for hit in hits:
                yield Hit(positions[hit.start], positions[hit.end - 1] + 1, hit.name)

    def settled_length(self, layers: list[Layer]) -> int:
        """How much of the beginning of layer 0 no continuation can make part of a value that goes on."""
        length = len(layers[0].data)
        if not self._kinds:
            return length
        settled = length
        cuts: dict[Layer, set[int]] = {}
        for layer in layers:
            raised = {length} if layer.below is None else {layer.raise_up(cut) for cut in cuts[layer.below]}
            cuts[layer] = _open_ends(layer.data, raised)
            for cut in cuts[layer]:
                settled = min(settled, layer.origin_of(cut), self._first_beginning(layer, cut, length))
        return settle(layers, settled)

    def _first_beginning(self, layer: Layer, cut: int, length: int) -> int:
        """The first place in layer 0 from which a needle may have begun that goes on after the cut."""
        begin = max(0, cut - self.span_bytes_max)
        data, first = layer.data[begin:cut], length
        for skeleton, search in self._kinds:
            if not search.may_go_on(skeleton.of(data[-_GLANCE_BYTES:])):
                continue
            positions = None
            for place in search.find_beginnings(skeleton.of(data)):
                positions = positions or skeleton.positions(data)
                origin = layer.origin_of(begin + positions[place])
                if origin >= length - self.span_bytes_max:
                    first = min(first, origin)
                    break
        return first


def _open_ends(data: bytes, cuts: set[int]) -> set[int]:
    """All places where the part that is sure may end.

    Whether what looks like the beginning of an escape becomes one is open; and if it does, what it stands for may go
    on with an escape of the next layer that begins before it.
    """
    fresh = ends = cuts | {len(data)}
    for _ in range(REDACTED_LAYERS_MAX):
        fresh = {find_beginning(data, end) for end in fresh} - ends
        ends = ends | fresh
    return ends


def replace(data: bytes, spans: Iterable[Span], done: int = 0, end: int | None = None) -> bytes:
    """The data from `done` to `end`, with one mark for each group of spans that overlap."""
    pieces: list[bytes] = []
    for span in spans:
        if span.start >= done:
            pieces += (data[done : span.start], _mark(data[span.start : span.end], span.name))
        done = max(done, span.end)
    return b"".join((*pieces, data[done:end]))


def _mark(found: bytes, name: str) -> bytes:
    """What stands in place of a value. JSON stays JSON: quotes at its ends stay, an object or a list becomes a text."""
    mark = f"[REDACTED:{name}]".encode()
    quote = _QUOTE.search(found)
    if quote and found[:1] + found[-1:] in (b"{}", b"[]"):
        return quote[0] + mark + quote[0]
    opening = quote[0] if quote and quote.start() == 0 else b""
    closing = found[len(found[:-1].rstrip(b"\\")) :] if found.endswith(b'"') else b""
    return opening + mark + closing
