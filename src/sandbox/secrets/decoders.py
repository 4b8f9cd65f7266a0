"""Escapes undone layer by layer, with the way back to where every byte came from."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import compress

from sandbox.secrets.escapes import (
    EscapeToken,
    before_backslashes,
    find_escapes,
    find_terminal_escapes,
    may_hold_escapes,
)
from sandbox.secrets.limits import REDACTED_LAYERS_MAX


class DecodedLayer:
    """The bytes as they came (layer 0), or with the tokens of the layer below replaced by their meaning."""

    def __init__(self, data: bytes, below: DecodedLayer | None = None) -> None:
        self.data = data
        self.below = below
        self._token_starts, self._token_ends = array("L"), array("L")  # of tokens, in the layer below
        self._meaning_starts, self._meaning_ends = array("L"), array("L")  # of what they stand for, in this layer

    def decode(self, find_tokens: Callable[[bytes], Iterator[EscapeToken]]) -> DecodedLayer | None:
        """The next layer; None when there are no such tokens."""
        layer = DecodedLayer(b"", self)
        pieces: list[bytes] = []
        copied = length = 0
        for start, end, meaning in find_tokens(self.data):
            pieces += (self.data[copied:start], meaning)
            length += start - copied
            layer._token_starts.append(start)
            layer._token_ends.append(end)
            layer._meaning_starts.append(length)
            length += len(meaning)
            layer._meaning_ends.append(length)
            copied = end
        layer.data = b"".join((*pieces, self.data[copied:]))
        return layer if pieces else None

    def original_span(self, start: int, end: int) -> tuple[int, int]:
        """The bytes of layer 0 that a non-empty stretch of this one came from."""
        layer = self
        while layer.below is not None:
            start, end = layer._span_below(start)[0], layer._span_below(end - 1)[1]
            layer = layer.below
        return start, end

    def original_position(self, position: int) -> int:
        """The place in layer 0 that a place in this one came from; the end stays the end."""
        layer = self
        while layer.below is not None:
            position = layer._span_below(position)[0] if position < len(layer.data) else len(layer.below.data)
            layer = layer.below
        return position

    def position_from_below(self, position: int) -> int:
        """Where a place in the layer below is in this one; within a token, where its meaning begins."""
        token = bisect_left(self._token_starts, position) - 1
        if token < 0:
            return position
        past = position - self._token_ends[token]
        return self._meaning_ends[token] + past if past >= 0 else self._meaning_starts[token]

    def token_start(self, position: int) -> int:
        """A place in the layer below, moved to the beginning of a token that it is within."""
        token = bisect_left(self._token_starts, position) - 1
        return self._token_starts[token] if token >= 0 and position < self._token_ends[token] else position

    def _span_below(self, position: int) -> tuple[int, int]:
        """The stretch of the layer below that one byte came from."""
        token = bisect_right(self._meaning_starts, position) - 1
        if token < 0:
            return position, position + 1
        past = position - self._meaning_ends[token]
        if past < 0:
            return self._token_starts[token], self._token_ends[token]
        return self._token_ends[token] + past, self._token_ends[token] + past + 1


def decode_layers(data: bytes) -> list[DecodedLayer]:
    """All layers, each behind the one below it, the bytes as they came first.

    Where terminal escapes are, the layers fork: without them, and with them left as they are. An escape character
    between the letters of a value makes one of the letter behind it. A terminal escape in the bytes as they came may
    end with a backslash, which makes an escape of the letter behind it: there the layers fork once more.
    """
    layers = [DecodedLayer(data)]
    while len(layers) <= REDACTED_LAYERS_MAX and (above := layers[-1].decode(find_escapes)) is not None:
        layers.append(above)
    first: list[DecodedLayer] = []
    if len(layers) > 1 and may_hold_escapes(data) and (above := layers[0].decode(find_terminal_escapes)) is not None:
        first += _strip_terminal_escapes(above, REDACTED_LAYERS_MAX)
    for depth, layer in enumerate(layers[1:] or layers):  # what is written as something else may be part of one
        if (above := layer.decode(find_terminal_escapes)) is not None:
            return [*layers, *first, *_strip_terminal_escapes(above, REDACTED_LAYERS_MAX - depth)]
    return [*layers, *first]


def _strip_terminal_escapes(layer: DecodedLayer, rounds: int) -> Iterator[DecodedLayer]:
    """The layer, and those above it, where terminal escapes that come to light are undone too."""
    yield layer
    for _ in range(rounds):
        before = layer
        for find_tokens in (find_escapes, find_terminal_escapes):
            if (above := layer.decode(find_tokens)) is not None:
                layer = above
                yield layer
        if layer is before:
            break


def align_cut(layers: list[DecodedLayer], position: int) -> int:
    """Move a place in layer 0 back until a cut there is within no token of any layer."""
    while (moved := _move_back(layers, position)) < position:
        position = moved
    return position


def _move_back(layers: list[DecodedLayer], position: int) -> int:
    places: dict[DecodedLayer, int] = {}
    for layer in layers:
        here = position
        if layer.below is not None:
            under = places[layer.below]
            if (start := layer.token_start(under)) < under:
                return layer.below.original_position(start)
            here = layer.position_from_below(under)
        if (start := before_backslashes(layer.data, here)) < here:
            return layer.original_position(start)
        places[layer] = here
    return position


_BLANK = b"\t\n\x0b\x0c\r "
_CONTROLS = bytes(range(32)) + b"\x7f"
_ESCAPE_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
"""Begins a terminal escape, as an escape character does."""


class Normalizer:
    """One way of reducing. `escapes` are replaced first, by something of the same length."""

    def __init__(self, escapes: dict[bytes, bytes], equivalents: tuple[bytes, bytes], dropped: bytes) -> None:
        self._escapes = escapes
        self._table = bytes.maketrans(*equivalents)
        self._dropped = dropped
        self._keep_table = bytes(byte not in dropped for byte in range(256))

    def normalize(self, data: bytes) -> bytes:
        """The skeleton."""
        return self._replace_escapes(data).translate(self._table, self._dropped)

    def positions(self, data: bytes) -> array[int]:
        """Where in `data` each byte of its skeleton stands."""
        return array("L", compress(range(len(data)), self._replace_escapes(data).translate(self._keep_table)))

    def _replace_escapes(self, data: bytes) -> bytes:
        if b"\\" in data:
            for escape, meaning in self._escapes.items():
                data = data.replace(escape, meaning)
        if self._escapes and b"\xc2" in data:
            data = _ESCAPE_INTRODUCER.sub(b"\0\0", data)
        return data


TEXT_NORMALIZER = Normalizer(
    {rb"\n": b"\0\n", rb"\t": b"\0\0", rb"\r": b"\0\0", rb"\b": b"\0\0", rb"\f": b"\0\0"},
    (b"+", b" "),
    bytes(set(_CONTROLS) - set(b"\n")) + b"\\",
)
"""Plain text: controls but line feeds are nothing, a plus is a space (as in forms)."""

CODE_NORMALIZER = Normalizer(
    {rb"\n": b"\0\0", rb"\t": b"\0\0", rb"\r": b"\0\0"},
    (b"-_", b"+/"),
    bytes(set(_CONTROLS) | set(_BLANK)) + b"\\",
)
"""Base64 and hex: line breaks and blanks are nothing, both alphabets are one."""

EXACT_NORMALIZER = Normalizer({}, (b"", b""), b"")
"""Every byte, for values that consist of what the others drop."""
