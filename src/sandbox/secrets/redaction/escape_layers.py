"""Decodes escapes layer by layer and maps positions back to the original bytes."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from sandbox.secrets.limits import DECODED_LAYERS_MAX
from sandbox.secrets.redaction.escape_decoding import (
    ESCAPE_FIRST_BYTES,
    EscapeToken,
    add_terminal_escapes,
    find_escapes,
    find_isolated_escapes,
    find_terminal_escapes,
    find_variable_length_escapes,
    may_contain_consecutive_escapes,
    may_contain_nested_escapes,
    may_contain_variable_length_escapes,
    start_of_backslashes,
    start_of_character,
)

FindTokens = Callable[[bytes], Iterator[EscapeToken]]
"""Finds escapes of certain kinds in the bytes of a layer."""

_ALTERNATIVE_DECODERS: tuple[tuple[Callable[[bytes], bool], FindTokens], ...] = (
    (may_contain_variable_length_escapes, find_variable_length_escapes),
    (may_contain_consecutive_escapes, find_isolated_escapes),
)
"""Other ways of decoding escapes, each with a quick check for tokens that `find_escapes` decodes differently."""

_FORMS_MAX = 64
"""Maximum number of forms of a value; only an unusual value has more than a few."""


class DecodedLayer:
    """The original bytes (layer 0), or the bytes of the layer below with their escape tokens decoded."""

    def __init__(self, data: bytes, source: DecodedLayer | None = None) -> None:
        self.data = data
        self.source = source
        self._token_starts, self._token_ends = array("L"), array("L")  # token spans in the layer below
        self._decoded_starts, self._decoded_ends = array("L"), array("L")  # spans of their decoded text in this layer
        self._has_escapes = False
        self._invisible_characters: list[EscapeToken] = []

    def decode(self, find_tokens: FindTokens) -> DecodedLayer | None:
        """Decode the tokens of this layer and return the next layer, or None if there are no tokens."""
        layer = self._replace(find_tokens(self.data))
        if layer is not None and find_tokens is not find_terminal_escapes:
            self._note_token_kinds(layer._token_starts, layer._token_ends)
        return layer

    def remove_invisible_text(self) -> DecodedLayer | None:
        """Return the next layer, with the escapes left unchanged but without invisible characters and terminal escapes.

        Returns None if this layer has no escapes or no invisible text. Call `decode` first.
        """
        if not self._has_escapes:
            return None
        if self._invisible_characters:
            return self._replace(add_terminal_escapes(self.data, self._invisible_characters))
        # Terminal escapes alone matter only in layer 0: the layers above it are also decoded without terminal escapes.
        return self._replace(find_terminal_escapes(self.data)) if self.source is None else None

    def _note_token_kinds(self, starts: array[int], ends: array[int]) -> None:
        first_bytes = {self.data[start] for start in starts}
        self._has_escapes |= not first_bytes.isdisjoint(ESCAPE_FIRST_BYTES)
        if self._has_escapes and not self._invisible_characters and not first_bytes <= ESCAPE_FIRST_BYTES:
            spans = zip(starts, ends, strict=True)
            self._invisible_characters = [
                (start, end, b"") for start, end in spans if self.data[start] not in ESCAPE_FIRST_BYTES
            ]

    def _replace(self, tokens: Iterable[EscapeToken]) -> DecodedLayer | None:
        layer = DecodedLayer(b"", self)
        pieces: list[bytes] = []
        copied = length = 0
        for start, end, decoded in tokens:
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
        """Map a position in the layer below to this layer. Within a token, return the start of its decoded text."""
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
        """Return the span in the layer below that one byte was decoded from."""
        token = bisect_right(self._decoded_starts, position) - 1
        if token < 0:
            return position, position + 1
        distance = position - self._decoded_ends[token]
        if distance < 0:
            return self._token_starts[token], self._token_ends[token]
        return self._token_ends[token] + distance, self._token_ends[token] + distance + 1


def decode_layers(data: bytes, *, keeps_escapes: bool = True) -> list[DecodedLayer]:
    """Return all layers, each after the one below it. The original bytes are first.

    keeps_escapes: whether values may contain text that looks like an escape.

    There are alternative layers where the bytes can be decoded in different ways:
    - At terminal escapes, which may be removed or left unchanged. An escape character within a value consumes the
      character after it.
    - At terminal escapes in the original bytes, if decoding escapes first could change them or the text around them.
    - At escapes whose length differs between languages.
    - At escapes that continue with an escaped character.
    - At invisible characters next to text that may be an escape or a part of a value, if `keeps_escapes`.
    """
    layers = _decode_escapes(DecodedLayer(data), find_escapes, DECODED_LAYERS_MAX)
    layers = [
        *layers,
        *(_layers_above_original_terminal_escapes(layers[0]) if len(layers) > 1 else ()),
        *_terminal_escape_layers(layers[1:] or layers, find_escapes, DECODED_LAYERS_MAX),
        *chain.from_iterable(_alternative_layers(layers, *decoder) for decoder in _ALTERNATIVE_DECODERS),
    ]
    others = (layer.remove_invisible_text() for layer in layers) if keeps_escapes else ()
    return [*layers, *filter(None, others)]


def decoded_forms(data: bytes) -> list[bytes]:
    """Return the data and the strings that result from decoding it, in any order and with any choice of alternatives.

    The text around a value determines how the value is decoded.
    """
    forms = {data: None}
    newest = [data]
    while newest and len(forms) < _FORMS_MAX:
        decoded = chain.from_iterable(map(_decode_in_each_way, newest))
        newest = [form for form in dict.fromkeys(decoded) if form not in forms]
        forms.update(dict.fromkeys(newest))
    return list(forms)


def _decode_in_each_way(data: bytes) -> Iterator[bytes]:
    """Decode the data in all ways, and yield the results that differ from the data."""
    layer = DecodedLayer(data)
    finders = [
        find_escapes,
        find_terminal_escapes,
        *(find for may_differ, find in _ALTERNATIVE_DECODERS if may_differ(data)),
    ]
    decoded_layers = [*(layer.decode(find_tokens) for find_tokens in finders), layer.remove_invisible_text()]
    yield from (decoded_layer.data for decoded_layer in filter(None, decoded_layers))


def _decode_escapes(layer: DecodedLayer, find_tokens: FindTokens, rounds: int) -> list[DecodedLayer]:
    """Return the layer and up to `rounds` layers above it, each decoded from the one before."""
    layers = [layer]
    while len(layers) <= rounds and (decoded_layer := layers[-1].decode(find_tokens)) is not None:
        layers.append(decoded_layer)
    return layers


def _alternative_layers(
    layers: list[DecodedLayer],
    may_differ: Callable[[bytes], bool],
    find_tokens: FindTokens,
) -> Iterator[DecodedLayer]:
    """Find the first layer from which `find_tokens` decodes a different layer; yield that layer and those above it."""
    for depth, layer in enumerate(layers):
        decoded_layer = layer.decode(find_tokens) if may_differ(layer.data) else None
        if decoded_layer is not None and [one.data for one in layers[depth + 1 : depth + 2]] != [decoded_layer.data]:
            rounds = DECODED_LAYERS_MAX - depth
            others = _decode_escapes(decoded_layer, find_tokens, rounds - 1)
            yield from others
            yield from _terminal_escape_layers(others, find_tokens, rounds)
            return


def _layers_above_original_terminal_escapes(original: DecodedLayer) -> Iterator[DecodedLayer]:
    """If the original's terminal escapes may contain other escapes, strip them and yield the resulting layers."""
    stripped = original.decode(find_terminal_escapes) if may_contain_nested_escapes(original.data) else None
    if stripped is not None:
        layers = [*_strip_terminal_escapes(stripped, find_escapes, DECODED_LAYERS_MAX)]
        yield from layers
        for may_differ, find_tokens in _ALTERNATIVE_DECODERS:
            if any(may_differ(layer.data) for layer in layers):
                yield from islice(_strip_terminal_escapes(stripped, find_tokens, DECODED_LAYERS_MAX), 1, None)


def _terminal_escape_layers(layers: list[DecodedLayer], find_tokens: FindTokens, rounds: int) -> Iterator[DecodedLayer]:
    """Strip the terminal escapes of the first layer that has any; yield the resulting layers."""
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
    """Move a position in layer 0 back until a cut there splits no token in any layer."""
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
        for find_start in (start_of_backslashes, start_of_character):
            if (start := find_start(layer.data, mapped_position)) < mapped_position:
                return layer.original_position(start)
        indexes[layer] = mapped_position
    return position
