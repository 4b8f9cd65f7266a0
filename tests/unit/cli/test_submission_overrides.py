"""`--set path=value`: accepted paths and values."""

import click
import pytest

from sandbox.cli.submission import parse_override
from sandbox.model.manifest.overrides import OverrideError


def apply_override(text: str, data: dict | None = None) -> dict:
    data = {} if data is None else data
    parse_override(text).apply(data)
    return data


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("16", 16),
        ("2.5", 2.5),
        ("true", True),
        ("no", "no"),
        ("null", None),
        ("", None),
        ('""', ""),
        ('"16"', "16"),
        ("'it''s'", "it's"),
        ("Fix: the #1 bug - now", "Fix: the #1 bug - now"),
        ("a=b", "a=b"),
        ('"half', '"half'),
        ('"a": b', '"a": b'),
        ("[Read, Bash]", "[Read, Bash]"),
    ],
)
def test_override_value_is_a_yaml_scalar_or_text(value, expected):
    assert apply_override(f"claude.prompt={value}") == {"claude": {"prompt": expected}}


def test_sibling_fields_are_preserved():
    data = {"vm": {"cpus": 4, "memory": "8G"}, "secrets": [{"name": "A", "key": "A"}]}
    apply_override("vm.cpus=16", data)
    apply_override("secrets[0].key=B", data)
    apply_override("secrets[1].name=C", data)
    assert data == {"vm": {"cpus": 16, "memory": "8G"}, "secrets": [{"name": "A", "key": "B"}, {"name": "C"}]}


def test_dot_in_a_name_is_escaped_with_a_backslash():
    assert apply_override(r"metadata.labels.example\.org/team=platform") == {
        "metadata": {"labels": {"example.org/team": "platform"}}
    }


def test_new_list_starts_at_index_0():
    assert apply_override("lifecycle.artifact_patterns[0]=*.md") == {"lifecycle": {"artifact_patterns": ["*.md"]}}
    with pytest.raises(OverrideError, match=r"the next index of this list is \[0\]"):
        apply_override("lifecycle.artifact_patterns[1]=*.md")


def test_scalar_in_the_path_is_replaced():
    assert apply_override("claude.prompt.x=1", {"claude": {"prompt": "p"}}) == {"claude": {"prompt": {"x": 1}}}


@pytest.mark.parametrize(
    "text", ["vm.cpus", "=1", ".=1", "vm.=1", ".vm=1", "vm..cpus=1", "[0]=1", "a[x]=1", "a[0=1", "a[0]b=1"]
)
def test_invalid_path_error_shows_an_example(text):
    with pytest.raises(click.BadParameter, match=r"vm\.cpus=16"):
        parse_override(text)


def test_number_out_of_range_is_rejected():
    with pytest.raises(click.BadParameter):
        parse_override("vm.cpus=99999999999999999999")
