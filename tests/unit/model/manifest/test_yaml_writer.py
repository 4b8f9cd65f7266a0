"""Data written as YAML is read back unchanged."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from doubles.manifests import read_document
from sandbox.model.display_text import replace_invisible
from sandbox.model.manifest.yaml import write_yaml

PIECES = [*"10+.a \t\n\r\x85\u2028\u2029\u200b\u3164\ufe0f\u20e3\U000e0041☎#:", "e5", "0o17", "08", "- "]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.lists(
    st.sampled_from(PIECES)
).map("".join)


@given(TEXTS, TEXTS)
@example("12e0345", "1e5")
@example("0o17", "08")
@example("+1e2", "a\x85b\nc")
@example("\u2028", "a b\u2029" * 40)
@example("\ufeff", "\n a")
def test_any_text_round_trips(name, value):
    data = {"x": {name: value, "list": [value, {"y": value}]}, "text": value}
    document = read_document(write_yaml(data).encode(), is_json=False)
    assert (document.data, document.errors) == (data, [])


@given(TEXTS, TEXTS)
@example("\u200bname", "two\nlines\u3164\n")
@example("tag\U000e0041", "\x011\ufe0f\u20e3")
def test_no_character_of_a_document_is_invisible(name, value):
    written = write_yaml({"x": {name: [value]}})
    assert replace_invisible(written, lambda _: "", allowed="\t\n") == written


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain words", "plain words"),
        ("two\nlines\n", "|\n  two\n  lines"),
        ("1e5", '"1e5"'),
        ("no", "'no'"),
        ("a\u200bb\n", r'"a\U0000200Bb\n"'),
        ("call ☎\ufe0f", "call ☎\ufe0f"),
        (1, "1"),
        (None, "null"),
        ([], "[]"),
        (["a"], "\n  - a"),
    ],
)
def test_values_are_written_in_conventional_style(value, expected):
    assert write_yaml({"x": value}) == f"x: {expected}\n".replace(": \n", ":\n")
