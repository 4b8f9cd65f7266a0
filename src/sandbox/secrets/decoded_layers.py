"""Decodes escapes layer by layer and maps positions back to the original bytes."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import compress

from sandbox.secrets.escapes import (
    EscapeToken,
    before_backslashes,
    before_character,
    find_escapes,
    find_isolated_escapes,
    find_terminal_escapes,
    find_variable_length_escapes,
    may_contain_consecutive_escapes,
    may_contain_nested_escapes,
    may_contain_variable_length_escapes,
)
from sandbox.secrets.limits import REDACTED_LAYERS_MAX

FindTokens = Callable[[bytes], Iterator[EscapeToken]]
"""Finds escapes of certain kinds in the bytes of a layer."""


class DecodedLayer:
    """The original bytes (layer 0), or the bytes of the layer below with their escape tokens decoded."""

    def __init__(self, data: bytes, source: DecodedLayer | None = None) -> None:
        self.data = data
        self.source = source
        self._token_starts, self._token_ends = array("L"), array("L")  # token spans in the layer below
        self._decoded_starts, self._decoded_ends = array("L"), array("L")  # spans of their decoded text in this layer

    def decode(self, find_tokens: FindTokens) -> DecodedLayer | None:
        """Decode the tokens of this layer and return the next layer, or None if there are no tokens."""
        layer = DecodedLayer(b"", self)
        pieces: list[bytes] = []
        copied = length = 0
        for start, end, decoded in find_tokens(self.data):
            pieces += (self.data[copied:start], decoded)
            length += start - copied
            layer._token_starts.append(start)
            layer._token_ends.append(end)
            layer._decoded_starts.append(length)
            length += len(decoded)
            layer._decoded_ends.append(length)
            copied = end
        layer.data = b"".join((*pieces, self.data[copied:]))
        return layer if pieces else None

    def original_span(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of layer 0 from which a non-empty span of this layer was decoded."""
        layer = self
        while layer.source is not None:
            start, end = layer._source_span(start)[0], layer._source_span(end - 1)[1]
            layer = layer.source
        return start, end

    def original_position(self, position: int) -> int:
        """Return the position in layer 0 from which a position in this layer was decoded; the end maps to the end."""
        layer = self
        while layer.source is not None:
            position = layer._source_span(position)[0] if position < len(layer.data) else len(layer.source.data)
            layer = layer.source
        return position

    def position_from_source(self, position: int) -> int:
        """Map a position in the layer below to this layer; within a token, to the start of its decoded text."""
        token = bisect_left(self._token_starts, position) - 1
        if token < 0:
            return position
        distance = position - self._token_ends[token]
        return self._decoded_ends[token] + distance if distance >= 0 else self._decoded_starts[token]

    def token_start(self, position: int) -> int:
        """Return a position in the layer below, moved to the start of the token that contains it."""
        token = bisect_left(self._token_starts, position) - 1
        return self._token_starts[token] if token >= 0 and position < self._token_ends[token] else position

    def _source_span(self, position: int) -> tuple[int, int]:
        """Return the span of the layer below from which one byte was decoded."""
        token = bisect_right(self._decoded_starts, position) - 1
        if token < 0:
            return position, position + 1
        distance = position - self._decoded_ends[token]
        if distance < 0:
            return self._token_starts[token], self._token_ends[token]
        return self._token_ends[token] + distance, self._token_ends[token] + distance + 1


def decode_layers(data: bytes) -> list[DecodedLayer]:
    """Return all layers, each after the one below it. The original bytes are first.

    The layers fork where the bytes can be decoded in different ways:
    - At terminal escapes, which may be removed or left unchanged. An escape character within a value consumes the
      character after it.
    - At a terminal escape in the original bytes that ends with a backslash, which also consumes the character after it.
    - At escapes whose length differs between languages.
    - At escapes that continue with an escaped character.
    """
    layers = _decode_escapes(DecodedLayer(data), find_escapes, REDACTED_LAYERS_MAX)
    first: list[DecodedLayer] = []
    if (
        len(layers) > 1
        and may_contain_nested_escapes(data)
        and (decoded_layer := layers[0].decode(find_terminal_escapes)) is not None
    ):
        first += _strip_terminal_escapes(decoded_layer, find_escapes, REDACTED_LAYERS_MAX)
    return [
        *layers,
        *first,
        *_terminal_escape_layers(layers[1:] or layers, find_escapes, REDACTED_LAYERS_MAX),
        *_forked_layers(layers, may_contain_variable_length_escapes, find_variable_length_escapes),
        *_forked_layers(layers, may_contain_consecutive_escapes, find_isolated_escapes),
    ]


def _decode_escapes(layer: DecodedLayer, find_tokens: FindTokens, rounds: int) -> list[DecodedLayer]:
    """Return the layer and the layers that are decoded from it, up to `rounds`."""
    layers = [layer]
    while len(layers) <= rounds and (decoded_layer := layers[-1].decode(find_tokens)) is not None:
        layers.append(decoded_layer)
    return layers


def _forked_layers(
    layers: list[DecodedLayer],
    may_differ: Callable[[bytes], bool],
    find_tokens: FindTokens,
) -> Iterator[DecodedLayer]:
    """Find the first layer that `find_tokens` decodes differently; yield the layers that result above it."""
    for depth, layer in enumerate(layers):
        decoded_layer = layer.decode(find_tokens) if may_differ(layer.data) else None
        if decoded_layer is not None and [one.data for one in layers[depth + 1 : depth + 2]] != [decoded_layer.data]:
            rounds = REDACTED_LAYERS_MAX - depth
            others = _decode_escapes(decoded_layer, find_tokens, rounds - 1)
            yield from others
            yield from _terminal_escape_layers(others, find_tokens, rounds)
            return


def _terminal_escape_layers(layers: list[DecodedLayer], find_tokens: FindTokens, rounds: int) -> Iterator[DecodedLayer]:
    """Yield the layers above the first one with terminal escapes, which may be inside an encoded escape."""
    for depth, layer in enumerate(layers):
        if (decoded_layer := layer.decode(find_terminal_escapes)) is not None:
            yield from _strip_terminal_escapes(decoded_layer, find_tokens, rounds - depth)
            return


def _strip_terminal_escapes(layer: DecodedLayer, find_tokens: FindTokens, rounds: int) -> Iterator[DecodedLayer]:
    """Yield the layer and those above it, both with and without the terminal escapes that decoding reveals."""
    yield layer
    for _ in range(rounds):
        before = layer
        for find in (find_tokens, find_terminal_escapes):
            if (decoded_layer := layer.decode(find)) is not None:
                layer = decoded_layer
                yield layer
        if layer is before:
            break


def align_cut(layers: list[DecodedLayer], position: int) -> int:
    """Move a position in layer 0 back to where a cut does not split a token in any layer."""
    while (moved := _move_back(layers, position)) < position:
        position = moved
    return position


def _move_back(layers: list[DecodedLayer], position: int) -> int:
    indexes: dict[DecodedLayer, int] = {}
    for layer in layers:
        mapped_position = position
        if layer.source is not None:
            target = indexes[layer.source]
            if (start := layer.token_start(target)) < target:
                return layer.source.original_position(start)
            mapped_position = layer.position_from_source(target)
        for find_start in (before_backslashes, before_character):
            if (start := find_start(layer.data, mapped_position)) < mapped_position:
                return layer.original_position(start)
        indexes[layer] = mapped_position
    return position


_BLANK = b"\t\n\x0b\x0c\r "
_CONTROLS = bytes(range(32)) + b"\x7f"
_ESCAPE_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
"""C1 controls that start a terminal escape, as an escape character does."""


class Normalizer:
    """A way of normalizing bytes before the search.

    `escapes` are replaced first, by text of the same length. `equivalents` are then unified, and `dropped` bytes
    removed.
    """

    def __init__(self, escapes: dict[bytes, bytes], equivalents: tuple[bytes, bytes], dropped: bytes) -> None:
        self._escapes = escapes
        self._table = bytes.maketrans(*equivalents)
        self._dropped = dropped
        self._keep_table = bytes(byte not in dropped for byte in range(256))

    def normalize(self, data: bytes) -> bytes:
        """Return the normalized bytes."""
        return self._replace_escapes(data).translate(self._table, self._dropped)

    def positions(self, data: bytes) -> array[int]:
        """Return the position in `data` of each byte of its normalized form."""
        return array("L", compress(range(len(data)), self._replace_escapes(data).translate(self._keep_table)))

    def _replace_escapes(self, data: bytes) -> bytes:
        if b"\\" in data:
            for escape, replacement in self._escapes.items():
                data = data.replace(escape, replacement)
        if self._escapes and b"\xc2" in data:
            data = _ESCAPE_INTRODUCER.sub(b"\0\0", data)
        return data


TEXT_NORMALIZER = Normalizer(
    {rb"\n": b"\0\n", rb"\t": b"\0\0", rb"\r": b"\0\0", rb"\b": b"\0\0", rb"\f": b"\0\0"},
    (b"+", b" "),
    bytes(set(_CONTROLS) - set(b"\n")) + b"\\",
)
"""Plain text: drops controls except line feeds; a plus counts as a space (as in forms)."""

ENCODED_NORMALIZER = Normalizer(
    {rb"\n": b"\0\0", rb"\t": b"\0\0", rb"\r": b"\0\0"},
    (b"-_", b"+/"),
    bytes(set(_CONTROLS) | set(_BLANK)) + b"\\",
)
"""Base64 and hex: drops line breaks and blanks, and unifies both base64 alphabets."""

EXACT_NORMALIZER = Normalizer({}, (b"", b""), b"")
"""Keeps every byte, for values that consist of bytes that the other normalizers drop."""
