"""Finds the values of secrets, in all common encodings, and replaces them with `[REDACTED:NAME]`.

Pure: no I/O. Finds a value unchanged; escaped for JSON, JavaScript, C, shells, HTML or URLs, even partly or nested; in
base64 (both alphabets, any alignment, wrapped) or in hex, even of an escaped value; and interspersed with terminal
escapes, carriage returns and zero-width characters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from typing import Any, NamedTuple

from sandbox.secrets.limits import (
    ALWAYS_RESCANNED_BYTES_MAX,
    DECODED_LAYERS_MAX,
    REDACTED_VALUE_CHARACTERS_MIN,
    VALUE_SPAN_BYTES_MAX,
)
from sandbox.secrets.redaction.escape_decoding import find_partial_escape, start_of_backslashes
from sandbox.secrets.redaction.escape_layers import DecodedLayer, align_cut, decode_layers
from sandbox.secrets.redaction.value_patterns import Normalizer, SecretPattern, make_patterns, may_contain_escapes

_WORD_BYTES = 4
"""Size of the integers that the search compares."""

_CANDIDATE_WORDS_MAX = 16
"""Maximum number of words of a pattern that are considered as its key, at each of its four alignments."""


class PatternMatch(NamedTuple):
    """A span that contains a pattern."""

    start: int
    end: int
    name: str


def _words(text: bytes, first: int = 0) -> memoryview[int]:
    """View the text from byte offset `first` as 4-byte integers; a shorter rest is dropped."""
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
                    found.add(Span(_start_of_escape(layers, start), -end, match.name))
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


def _start_of_escape(layers: list[DecodedLayer], position: int) -> int:
    r"""Return the start of the backslash escape in layer 0 that contains `position`, or `position`.

    In `\u001bf93c0de`, a value may start with the last digit of the escape. The rest of the escape would be invalid.
    """
    data = layers[0].data
    starts = (layer.token_start(position) for layer in layers if layer.source is layers[0])
    escape_start = min((start for start in starts if data.startswith(b"\\", start)), default=position)
    return start_of_backslashes(data, escape_start)


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


_QUOTE = re.compile(rb'\\{0,64}+"')


class SecretStreamRedactor:
    """Redacts a stream. The output is the redaction of the whole stream, however the input is split.

    Bytes that may be the start of a value are held back until more input shows whether they are: at most
    `Scanner.span_bytes_max` bytes plus the escapes at their start, and a quarter more until they are rescanned. Split
    the output into lines, never the input.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._pending = b""
        self._unscanned = bytearray()
        self._emitted = 0
        self._started_value: int | None = None
        """Position in the pending data at which a value has probably started; None before the search."""
        self.has_redacted = False

    @property
    def pending_bytes(self) -> int:
        """The number of bytes held back."""
        return len(self._pending) + len(self._unscanned) - self._emitted

    def feed(self, chunk: bytes) -> bytes:
        """Add input. Returns the output that is ready."""
        if not self._scanner.span_bytes_max:
            return chunk
        self._unscanned += chunk
        # Rescanning everything for each chunk would take quadratic time.
        if len(self._pending) > max(ALWAYS_RESCANNED_BYTES_MAX, 4 * len(self._unscanned)):
            return b""
        return self._release(is_end=False)

    def flush_lines(self) -> bytes:
        """Return the complete lines that are held back, up to a line that probably contains the start of a value.

        Call it after a pause of the input. The lines may contain the first few characters of wrapped base64, hex or a
        multi-line value; then only the rest of the value is redacted.
        """
        released = self._release(is_end=False) if self._unscanned else b""
        if self._started_value is None:
            self._started_value = self._scanner.find_partial_value(self._scanner.decode(self._pending))
        end = self._pending.rfind(b"\n", 0, self._started_value) + 1
        flushed = self._pending[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return released + flushed

    def flush(self) -> bytes:
        """Return everything held back, at the end of the stream."""
        return self._release(is_end=True)

    def _release(self, *, is_end: bool) -> bytes:
        data = self._pending + self._unscanned
        self._unscanned.clear()
        layers = self._scanner.decode(data)
        safe_length = len(data) if is_end else self._scanner.safe_length(layers)
        spans = [span for span in self._scanner.find(layers) if span.start < safe_length]
        self.has_redacted = self.has_redacted or bool(spans)
        released = _replace_spans(data, spans, self._emitted, safe_length)
        self._emitted = max(0, max([self._emitted, *(span.end for span in spans)]) - safe_length)
        self._pending = data[safe_length:]
        self._started_value = None
        return released


class SecretRedactor:
    """Redacts the secrets of one task. values: keyed by secret name; neither the repr nor errors contain them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.unsearchable_secret_names: tuple[str, ...] = tuple(
            name for name, value in values.items() if len(value) < REDACTED_VALUE_CHARACTERS_MIN
        )
        self._scanner = Scanner(
            {name: value for name, value in values.items() if name not in self.unsearchable_secret_names}
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def redact(self, data: bytes) -> bytes:
        """Return the bytes with all values redacted; the same object if there is nothing to redact."""
        spans = self._scanner.find(self._scanner.decode(data)) if self._scanner.span_bytes_max else []
        return _replace_spans(data, spans) if spans else data

    def redact_text(self, text: str) -> str:
        """Return the text without values."""
        data = text.encode("utf-8", "surrogatepass")
        redacted = self.redact(data)
        if redacted is data:
            return text
        try:
            return redacted.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a match may split a character if the value is not text
            return redacted.decode("utf-8", "replace")

    def redact_json(self, value: Any) -> Any:
        """Return JSON data with all values in its strings and keys redacted."""
        if isinstance(value, str):
            return self.redact_text(value)
        if isinstance(value, dict):
            return {self.redact_json(key): self.redact_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.redact_json(item) for item in value]
        return value

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the concatenated chunks contain a value."""
        stream = self.stream()
        for chunk in chunks:
            stream.feed(chunk)
            if stream.has_redacted:
                return True
        stream.flush()
        return stream.has_redacted

    def stream(self) -> SecretStreamRedactor:
        """Return a redactor for another stream."""
        return SecretStreamRedactor(self._scanner)


def _replace_spans(data: bytes, spans: Iterable[Span], begin: int = 0, end: int | None = None) -> bytes:
    """Return `data[begin:end]` with one placeholder for each group of overlapping spans."""
    pieces: list[bytes] = []
    for span in spans:
        if span.start >= begin:
            pieces += (data[begin : span.start], _placeholder(data[span.start : span.end], span.name))
        begin = max(begin, span.end)
    return b"".join((*pieces, data[begin:end]))


def _placeholder(matched: bytes, name: str) -> bytes:
    """Return the placeholder of a value. JSON remains valid: outer quotes are kept, and objects become strings."""
    placeholder = f"[REDACTED:{name}]".encode()
    quote = _QUOTE.search(matched)
    if quote and matched[:1] + matched[-1:] in (b"{}", b"[]"):
        return quote[0] + placeholder + quote[0]
    opening_quote = quote[0] if quote and quote.start() == 0 else b""
    closing = matched[len(matched[:-1].rstrip(b"\\")) :] if matched.endswith(b'"') else b""
    return opening_quote + placeholder + closing
