"""The server's key is redacted from responses that echo request headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.model_api.upstream import BodyRedactor, ValueRedactor

KEY = b"sk-ant-the-servers-own"
MASKED = b"*" * len(KEY)


def redacted(chunks, key=KEY):
    redactor = BodyRedactor([ValueRedactor(key)])
    return b"".join([*map(redactor.feed, chunks), redactor.flush()])


def split(body, size):
    return [body[at : at + size] for at in range(0, len(body), size)]


@given(st.integers(1, 40), st.binary(max_size=20), st.binary(max_size=20))
def test_key_is_redacted_across_chunk_boundaries(size, before, after):
    body = redacted(split(before + KEY + b"," + KEY + after, size))
    assert body == before + MASKED + b"," + MASKED + after


@given(
    st.lists(st.sampled_from([b"s", b"sk-", b"sk-ant-the-servers-ow", b"data: {}\n\n", b"\xff"])), st.integers(1, 30)
)
def test_data_without_the_key_is_unchanged(parts, size):
    body = b"".join(parts)
    assert redacted(split(body, size)) == body


def test_complete_event_is_not_buffered():
    assert BodyRedactor([ValueRedactor(KEY)]).feed(b"data: {}\n\n") == b"data: {}\n\n"


def test_short_key_is_not_redacted():
    assert redacted([b"a kind of key"], key=b"k") == b"a kind of key"


ESCAPED_KEY = b"gw-live-9f8e7d6c5b4a/="
KEY_ENCODINGS = {
    "special characters": ESCAPED_KEY.replace(b"=", rb"\u003D").replace(b"/", rb"\/"),
    "all characters": b"".join(rb"\u%04x" % character for character in ESCAPED_KEY),
    "mixed": rb"\u0067" + ESCAPED_KEY[1:-1] + rb"\u003d",
    "JSON in JSON": ESCAPED_KEY.replace(b"=", rb"\\u003D").replace(b"/", rb"\\\/"),
    "JSON in JSON in JSON": ESCAPED_KEY.replace(b"=", rb"\\\\u003D").replace(b"/", rb"\\\\\\\/"),
}


@pytest.mark.parametrize("encoded_key", KEY_ENCODINGS.values(), ids=KEY_ENCODINGS)
def test_key_with_json_escapes_is_redacted_regardless_of_chunk_boundaries(encoded_key):
    before, after = b'{"message": "The key ', rb" may not be used: \u00e9."
    expected = before + b"*" * len(encoded_key) + after
    for at in range(len(before + encoded_key + after) + 1):
        body = before + encoded_key + after
        assert redacted([body[:at], body[at:]], ESCAPED_KEY) == expected
    assert redacted(split(body, 1), ESCAPED_KEY) == expected


KEY_WITH_BACKSLASHES = rb"domain\user\\u\key"
KEY_ENCODINGS_WITH_BACKSLASHES = {
    "Unicode escapes": KEY_WITH_BACKSLASHES.replace(b"\\", rb"\u005C"),
    "JSON": KEY_WITH_BACKSLASHES.replace(b"\\", rb"\\"),
    "JSON in JSON": KEY_WITH_BACKSLASHES.replace(b"\\", rb"\\\\"),
    "Unicode escapes in JSON": KEY_WITH_BACKSLASHES.replace(b"\\", rb"\\u005c"),
    "plain": KEY_WITH_BACKSLASHES,
    "mixed": KEY_WITH_BACKSLASHES.replace(b"\\", rb"\u005c", 1).replace(b"user", rb"\u0075ser"),
}


@pytest.mark.parametrize("encoded_key", KEY_ENCODINGS_WITH_BACKSLASHES.values(), ids=KEY_ENCODINGS_WITH_BACKSLASHES)
def test_key_with_backslashes_is_redacted_regardless_of_chunk_boundaries(encoded_key):
    before, after = b'{"message": "Not a key: ', rb'\\", "a": "\u005c"}'
    body = before + encoded_key + after
    expected = before + b"*" * len(encoded_key) + after
    for at in range(len(body) + 1):
        assert redacted([body[:at], body[at:]], KEY_WITH_BACKSLASHES) == expected
    assert redacted(split(body, 1), KEY_WITH_BACKSLASHES) == expected
    assert redacted(split(body, 1), KEY_WITH_BACKSLASHES[:-1] + b"z") == body


AWKWARD_KEYS = (
    *(b'"quoted"-key', b"/path/key", b"sskssksskssk", b"s]^key-.*", b"s/slash-key"),
    *(rb"\first-key", rb"s\\key-\x", rb"\u0073\u0073-key", rb"\"/\"/key"),
)


@given(st.sampled_from(AWKWARD_KEYS), st.data(), st.integers(1, 30))
def test_key_with_any_json_escapes_is_redacted_across_chunk_boundaries(key, data, size):
    encoded_bytes = [
        data.draw(st.sampled_from([bytes([one]), b"\\" + bytes([one]) if one in b'"/\\' else rb"\u%04X" % one]))
        for one in key
    ]
    encoded = b"".join(encoded_bytes)
    before, after = (data.draw(st.sampled_from([b"", b"s", b"\n", b"\xff: s"])) for _ in range(2))
    assert redacted(split(before + encoded + after, size), key) == before + b"*" * len(encoded) + after


@pytest.mark.parametrize(
    "body", [rb"gw-live-9f8e7d6c5b4a\u002f+", rb"GW-live-9f8e7d6c5b4a\/=", b"gw-live-9f8e7d6c5b4a/", rb"x\u00", b"\\"]
)
def test_similar_text_with_escapes_is_unchanged(body):
    assert redacted(split(body, 3), ESCAPED_KEY) == body


def test_one_redactor_serves_several_bodies():
    redactor = ValueRedactor(KEY)
    first, second = BodyRedactor([redactor]), BodyRedactor([redactor])
    assert first.feed(KEY[:5]) == b""
    assert second.feed(b"data") == b"data"
    assert first.feed(KEY[5:]) == MASKED
    assert second.feed(KEY) == MASKED
