"""Where in some bytes values stand, and how much of the beginning of a stream is settled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from sandbox.secrets.layers import Layer, settle
from sandbox.secrets.limits import REDACTED_LAYERS_MAX, REDACTED_SPREAD_BYTES_MAX
from sandbox.secrets.needles import make_needles
from sandbox.secrets.search import Hit, Search
from sandbox.secrets.skeleton import Skeleton
from sandbox.secrets.tokens import find_beginning, step_back

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
