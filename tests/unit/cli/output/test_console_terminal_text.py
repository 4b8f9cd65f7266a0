"""Text from a task cannot control the terminal."""

import json

import pytest

from sandbox.cli.output.console import escape_json, escape_name, escape_text


@pytest.mark.parametrize(
    ("hostile", "escaped"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten", r"over\rwritten"),
        ("two\nlines", r"two\nlines"),
        ("txt\u202egnp", r"txt\u202egnp"),
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
        ("\U000e0041", r"\U000e0041"),
        ("\u3164\u2800\u115f", r"\u3164\u2800\u115f"),
        ("a\ufe0fb", r"a\ufe0fb"),
        ("\ufdd0", r"\ufdd0"),
    ],
)
def test_control_characters_are_escaped(hostile, escaped):
    assert escape_text(hostile) == escaped


@pytest.mark.parametrize("text", ["", "plain", "grün 日本 🎉", "a\tb", "non\u00a0breaking", "⚠️ done 1️⃣ ❤️"])
def test_printable_text_is_unchanged(text):
    assert escape_text(text) == text


def test_names_are_escaped_more_strictly_than_text():
    assert escape_name("a\u00a0b\u3164\ufe0f\t") == r"a\xa0b\u3164\ufe0f\t"
    assert escape_name("\u0301x ❤️") == r"\u0301x ❤\ufe0f"
    assert escape_name("报告 तقرير.txt") == "报告 तقرير.txt"


def test_escaped_json_decodes_to_the_original_value():
    value = {"name": "\x1b[31m 日本 \u202e \U000e0041 \x9b \u3164 \ud800 \ufe0f", "list": ["\n", 1, None]}
    text = escape_json(value)
    assert json.loads(text) == value
    assert "日本" in text
    assert not set(text) & {"\x1b", "\u202e", "\U000e0041", "\x9b", "\u3164", "\ud800", "\ufe0f"}
