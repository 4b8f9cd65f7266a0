"""Finds the spans of values in bytes, and the prefix of a stream that is safe to release."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from typing import NamedTuple

from sandbox.secrets.limits import DECODED_LAYERS_MAX, VALUE_SPAN_BYTES_MAX
from sandbox.secrets.redaction.escape_decoding import find_partial_escape, start_of_backslashes
from sandbox.secrets.redaction.escape_layers import DecodedLayer, align_cut, decode_layers
from sandbox.secrets.redaction.normalizer import Normalizer
from sandbox.secrets.redaction.value_patterns import SecretPattern, make_patterns, may_contain_escapes

_WORD_BYTES = 4
_CANDIDATE_WORDS_MAX = 16
"""Maximum number of words of a pattern that are considered as its key, at each of its four alignments."""


class PatternMatch(NamedTuple):
    """A span that contains a pattern."""

    start: int
    end: int
    name: str


def _words(text: bytes, first: int = 0) -> memoryview[int]:
    """Return the words starting at position `first`."""
    return memoryview(text)[first : len(text) - (len(text) - first) % _WORD_BYTES].cast("I")


def _most_selective(words: memoryview[int], index: Mapping[int, Sequence[object]]) -> int:
    """Return the index of the word that is the key of the fewest patterns.

    Secrets share prefixes and suffixes with other text, so the middle word is preferred if it is not used yet.
    """
    middle = len(words) // 2
    if words[middle] not in index:
        return middle
    step = -(-len(words) // _CANDIDATE_WORDS_MAX)
    candidates = words[::step].tolist()
    best = next(filterfalse(index.__contains__, candidates), None)
    if best is None:
        best = min(candidates, key=lambda word: len(index[word]))
    return candidates.index(best) * step


class MultiPatternSearch:
    """Searches for a fixed set of patterns."""

    def __init__(self, patterns: Iterable[SecretPattern]) -> None:
        known: dict[int, list[tuple[SecretPattern, int]]] = defaultdict(list)
        patterns_by_prefix: dict[bytes, list[bytes]] = defaultdict(list)
        inner: set[int] = set()
        self.longest_bytes = 0
        for pattern in patterns:
            text = pattern.normalized
            self.longest_bytes = max(self.longest_bytes, len(text))
            inner.update(text[:-1])
            for length in range(1, _WORD_BYTES + 1):
                patterns_by_prefix[text[:length]].append(text)
            for first in range(_WORD_BYTES):
                words = _words(text, first)
                index = _most_selective(words, known)
                known[words[index]].append((pattern, first + index * _WORD_BYTES))
        self._patterns_by_word, self._word_set = dict(known), frozenset(known)
        self._patterns_by_prefix, self._inner_bytes = dict(patterns_by_prefix), frozenset(inner)

    def find(self, text: bytes) -> Iterator[PatternMatch]:
        """Yield every occurrence of every pattern."""
        words = _words(text)
        if self._word_set.isdisjoint(words):
            return
        for index, word in enumerate(words):
            if word in self._word_set:
                for pattern, offset in self._patterns_by_word[word]:
                    start = index * _WORD_BYTES - offset
                    if start >= 0 and text.startswith(pattern.normalized, start):
                        yield PatternMatch(start, start + len(pattern.normalized), pattern.name)

    def may_continue(self, text: bytes) -> bool:
        """Return whether the last byte may be inside a pattern. A quick check that returns False at most line ends."""
        return not text or text[-1] in self._inner_bytes

    def find_partial_matches(self, text: bytes, bytes_min: int) -> Iterator[int]:
        """Yield every position from which the rest of the text is the start of a pattern.

        bytes_min: minimum length of the rest.
        """
        for start in range(max(0, len(text) - self.longest_bytes + 1), len(text) - bytes_min + 1):
            patterns = self._patterns_by_prefix.get(text[start : start + _WORD_BYTES])
            if patterns is not None:
                rest = text[start:]
                if any(len(pattern) > len(rest) and pattern.startswith(rest) for pattern in patterns):
                    yield start


_QUICK_CHECK_BYTES = 64
_PARTIAL_VALUE_BYTES = 8
"""Minimum length at which the start of a pattern is unlikely to match other text."""


class Span(NamedTuple):
    """A span of bytes that contains a value. Spans sort by position, longer ones first."""

    start: int
    negated_end: int
    name: str

    @property
    def end(self) -> int:
        """The position after the last byte."""
        return -self.negated_end


class Scanner:
    """Finds the values of one task's secrets. values: keyed by secret name; the repr does not contain them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._searches: list[tuple[Normalizer, MultiPatternSearch]] = [
            (normalizer, MultiPatternSearch(patterns)) for normalizer, patterns in make_patterns(values) if patterns
        ]
        self._keeps_escapes = any(map(may_contain_escapes, values.values()))
        longest = max((search.longest_bytes for _, search in self._searches), default=0)
        span_limit = min(32 * longest + 4096, max(4 * longest, VALUE_SPAN_BYTES_MAX))
        self.span_bytes_max = span_limit if longest else 0
        """A value is not found if escapes or other bytes inside it spread it over more than this many bytes."""

    def decode(self, data: bytes) -> list[DecodedLayer]:
        """Decode the layers that are searched for the values."""
        return decode_layers(data, keeps_escapes=self._keeps_escapes)

    def find(self, layers: list[DecodedLayer]) -> list[Span]:
        """Return the spans of values, in order."""
        found: set[Span] = set()
        for layer in layers:
            for match in self._find_in_layer(layer):
                start, end = layer.original_span(match.start, match.end)
                if end - start <= self.span_bytes_max:
                    found.add(Span(start_of_backslashes(layers[0].data, start), -end, match.name))
        return sorted(found)

    def _find_in_layer(self, layer: DecodedLayer) -> Iterator[PatternMatch]:
        for normalizer, search in self._searches:
            matches = list(search.find(normalizer.normalize(layer.data)))
            positions = normalizer.positions(layer.data) if matches else ()
            for match in matches:
                yield PatternMatch(positions[match.start], positions[match.end - 1] + 1, match.name)

    def safe_length(self, layers: list[DecodedLayer]) -> int:
        """Return the length of the prefix of layer 0 in which no unfinished value starts."""
        length = len(layers[0].data)
        if not self._searches:
            return length
        safe_end = length
        for layer, cut in _layer_cuts(layers):
            safe_end = min(safe_end, layer.original_position(cut), self._first_partial_match(layer, cut, length, 1))
        return align_cut(layers, safe_end)

    def find_partial_value(self, layers: list[DecodedLayer]) -> int:
        """Return the first position in layer 0 at which a value has likely started; the end of the data if none has."""
        length = len(layers[0].data)
        starts = (self._first_partial_match(*cut, length, _PARTIAL_VALUE_BYTES) for cut in _layer_cuts(layers))
        return min(starts, default=length)

    def _first_partial_match(self, layer: DecodedLayer, cut: int, length: int, bytes_min: int) -> int:
        """Return the first position in layer 0 at which a pattern that continues after the cut may start.

        bytes_min: number of bytes of the pattern before the cut.
        """
        begin = max(0, cut - self.span_bytes_max)
        data, first = layer.data[begin:cut], length
        for normalizer, search in self._searches:
            if not search.may_continue(normalizer.normalize(data[-_QUICK_CHECK_BYTES:])):
                continue
            positions = None
            for match_start in search.find_partial_matches(normalizer.normalize(data), bytes_min):
                positions = positions or normalizer.positions(data)
                origin = layer.original_position(begin + positions[match_start])
                if origin >= length - self.span_bytes_max:
                    first = min(first, origin)
                    break
        return first


def _layer_cuts(layers: list[DecodedLayer]) -> Iterator[tuple[DecodedLayer, int]]:
    """Yield each layer with each possible end of the part of its data that further input cannot change."""
    cuts: dict[DecodedLayer, set[int]] = {}
    for layer in layers:
        mapped_cuts = (
            {len(layer.data)}
            if layer.source is None
            else {layer.position_from_source(cut) for cut in cuts[layer.source]}
        )
        cuts[layer] = _possible_cuts(layer.data, mapped_cuts)
        yield from ((layer, cut) for cut in cuts[layer])


def _possible_cuts(data: bytes, cuts: set[int]) -> set[int]:
    """Return the possible ends of the part of the data that further input cannot change.

    Further input may complete an incomplete escape. Its decoded text may then complete an escape that starts earlier in
    the next layer.
    """
    new_cuts = ends = cuts | {len(data)}
    for _ in range(DECODED_LAYERS_MAX):
        new_cuts = {find_partial_escape(data, end) for end in new_cuts} - ends
        ends = ends | new_cuts
    return ends
