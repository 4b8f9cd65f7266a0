"""Untrusted names and messages are printed on one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.model.display_text import (
    escape_character,
    is_printable,
    replace_invisible,
    replace_unprintable,
    replacement_character,
)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("two\nlines\r\tend", r"two\nlines\r\tend"),
        ("txt\u202egnp", r"txt\u202egnp"),
        ("\u2028\u00a0\ud800", r"\u2028\xa0\ud800"),
        ("\u3164", r"\u3164"),
        ("a\u2800b\ufe0f", r"a\u2800b\ufe0f"),
        ("\u115f\u034f\u17b4\U000e0100", r"\u115f\u034f\u17b4\U000e0100"),
        ("\u2764\ufe0f", "\u2764" + r"\ufe0f"),
        ("ideographic\u3000space", r"ideographic\u3000space"),
        ("\ue000\u0378\ufffe", r"\ue000\u0378\ufffe"),
        ("\u0301a/\u0301b \u0338c\n\u0301", r"\u0301a/\u0301b \u0338c\n\u0301"),
        ("می‌خواهم", "می\\u200cخواهم"),
    ],
)
def test_unprintable_characters_are_escaped(text, escaped):
    assert replace_unprintable(text, escape_character) == escaped
    assert replace_unprintable(text, replacement_character).count("\ufffd") >= 1


@pytest.mark.parametrize(
    "text", ["", "plain text", "grün 日本 🎉", "报告.txt", "تقرير", "रिपोर्ट", "דוח", "e\u0301t\u00e9", "❤👍🏽🇩🇪"]
)
def test_printable_text_is_unchanged(text):
    assert replace_unprintable(text, escape_character) == replace_unprintable(text, replacement_character) == text


@given(st.text())
def test_any_text_becomes_one_printable_line(text):
    for write in (escape_character, replacement_character):
        assert replace_unprintable(text, write).isprintable()
        assert is_printable(replace_unprintable(text, write))


@pytest.mark.parametrize("text", ["⚠️ 1️⃣ ℹ️ ❤︎ ↔️", "non\u00a0breaking", "a\tb", "\u0301", "\ue0b0", "e\u0301"])
def test_visible_text_is_preserved_by_replace_invisible(text):
    assert replace_invisible(text, escape_character, "\t") == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\ufe0fb", r"a\ufe0fb"),
        ("\ufe0f", r"\ufe0f"),
        ("1\ufe0f", r"1\ufe0f"),
        (".\ufe0f", r".\ufe0f"),
        ("\u26a0\ufe0f\ufe0f", "\u26a0\ufe0f" + r"\ufe0f"),
        ("\u2800\ufe0f", r"\u2800\ufe0f"),
        ("x\ufe0f\u20e3", r"x\ufe0f" + "\u20e3"),
        ("\u3164\u061c\t", r"\u3164\u061c" + "\t"),
    ],
)
def test_hidden_characters_are_escaped_by_replace_invisible(text, escaped):
    assert replace_invisible(text, escape_character, "\t") == escaped
