"""`--set path=value`: which places and values are understood."""

import click
import pytest

from sandbox.cli.overrides import OverrideError, parse_override


def assigned(text: str, data: dict | None = None) -> dict:
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
def test_a_value_is_a_scalar_of_yaml_and_anything_else_is_text(value, expected):
    assert assigned(f"claude.prompt={value}") == {"claude": {"prompt": expected}}


def test_what_stands_beside_the_field_stays():
    data = {"vm": {"cpus": 4, "memory": "8G"}, "secrets": [{"name": "A", "key": "A"}]}
    assigned("vm.cpus=16", data)
    assigned("secrets[0].key=B", data)
    assigned("secrets[1].name=C", data)
    assert data == {"vm": {"cpus": 16, "memory": "8G"}, "secrets": [{"name": "A", "key": "B"}, {"name": "C"}]}


def test_a_dot_in_a_name_is_written_with_a_backslash():
    assert assigned(r"metadata.labels.example\.org/team=platform") == {
        "metadata": {"labels": {"example.org/team": "platform"}}
    }


def test_a_list_begins_at_its_first_entry():
    assert assigned("lifecycle.artifact_patterns[0]=*.md") == {"lifecycle": {"artifact_patterns": ["*.md"]}}
    with pytest.raises(OverrideError, match=r"so the next one is \[0\]"):
        assigned("lifecycle.artifact_patterns[1]=*.md")


def test_what_is_in_the_way_makes_room_for_the_server_to_judge():
    assert assigned("claude.prompt.x=1", {"claude": {"prompt": "p"}}) == {"claude": {"prompt": {"x": 1}}}


@pytest.mark.parametrize(
    "text", ["vm.cpus", "=1", ".=1", "vm.=1", ".vm=1", "vm..cpus=1", "[0]=1", "a[x]=1", "a[0=1", "a[0]b=1"]
)
def test_what_is_no_path_says_how_one_looks(text):
    with pytest.raises(click.BadParameter, match=r"vm\.cpus=16"):
        parse_override(text)


def test_a_number_that_nobody_can_use_is_refused():
    with pytest.raises(click.BadParameter):
        parse_override("vm.cpus=99999999999999999999")
