"""An upstream that echoes a request's headers does not tell the server's key to the sandbox."""

from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.model.dialer import KeyRedactor

KEY = b"sk-ant-the-servers-own"
BLANKED = b"*" * len(KEY)


def screened(chunks, key=KEY):
    screen = KeyRedactor(key)
    return b"".join([*map(screen.feed, chunks), screen.flush()])


def cut(body, size):
    return [body[at : at + size] for at in range(0, len(body), size)]


@given(st.integers(1, 40), st.binary(max_size=20), st.binary(max_size=20))
def test_the_key_is_blanked_wherever_the_body_is_cut(size, before, after):
    body = screened(cut(before + KEY + b"," + KEY + after, size))
    assert body == before + BLANKED + b"," + BLANKED + after


@given(
    st.lists(st.sampled_from([b"s", b"sk-", b"sk-ant-the-servers-ow", b"data: {}\n\n", b"\xff"])), st.integers(1, 30)
)
def test_everything_else_passes_byte_for_byte(parts, size):
    body = b"".join(parts)
    assert screened(cut(body, size)) == body


def test_an_event_is_not_held_back():
    assert KeyRedactor(KEY).feed(b"data: {}\n\n") == b"data: {}\n\n"


def test_a_key_too_short_to_be_told_from_text_is_not_looked_for():
    assert screened([b"a kind of key"], key=b"k") == b"a kind of key"
