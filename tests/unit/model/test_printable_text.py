"""Names and messages that others chose stay in their line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.model.printable import escaped, printable, replaced


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("two\nlines\r\tend", r"two\nlines\r\tend"),
        ("txt\u202egnp", r"txt\u202egnp"),
        ("\u2028\u00a0\ud800", r"\u2028\xa0\ud800"),
    ],
)
def test_what_does_not_show_is_written_out(hostile, shown):
    assert printable(hostile, escaped) == shown
    assert printable(hostile, replaced).count("\ufffd") >= 1


@pytest.mark.parametrize("text", ["", "plain text", "grün 日本 🎉"])
def test_what_shows_stays(text):
    assert printable(text, escaped) == printable(text, replaced) == text


@given(st.text())
def test_whatever_comes_stays_one_line(text):
    for write in (escaped, replaced):
        assert printable(text, write).isprintable()
