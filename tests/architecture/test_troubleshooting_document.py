"""Each symptom in docs/troubleshooting.md is one of the product's messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.model.failure import FailureCode

PLACEHOLDER = "\0"
"""Replaces the variable parts of an f-string."""


def texts_in(tree: ast.AST) -> Iterator[str]:
    """Yield the text of each string and f-string in a module."""
    for node in ast.walk(tree):
        match node:
            case ast.JoinedStr(values=values):
                yield "".join(str(value.value) if isinstance(value, ast.Constant) else PLACEHOLDER for value in values)
            case ast.Constant(value=str(text)):
                yield text


def missing_fragments(message: str, texts: list[str]) -> list[str]:
    """Return the parts of a quoted message, split at `…`, that appear in none of the product's texts."""
    fragments = [fragment.strip(" ().;:") for fragment in message.split("…")]
    return [one for one in fragments if len(one) > 3 and not any(one in text for text in texts)]


@pytest.fixture(scope="module")
def texts(trees: dict[Path, ast.Module]) -> list[str]:
    return [text for tree in trees.values() for text in texts_in(tree)]


@pytest.fixture
def symptoms(root: Path) -> list[str]:
    return re.findall(r"^### (.+)$", (root / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def test_each_quoted_message_is_printed_by_the_product(symptoms: list[str], texts: list[str]):
    messages = [symptom.strip("`") for symptom in symptoms if symptom.startswith("`")]
    assert len(messages) >= 30
    assert {message: missing for message in messages if (missing := missing_fragments(message, texts))} == {}


def test_each_quoted_code_is_a_failure_code(symptoms: list[str]):
    codes = [code for symptom in symptoms if not symptom.startswith("`") for code in re.findall(r"`(\w+)`", symptom)]
    assert codes
    assert [code for code in codes if code not in {str(known) for known in FailureCode}] == []


@pytest.mark.parametrize(
    ("message", "is_known"),
    [
        ("`Cannot clone …: it has no branch …; check repository.branch.`", True),
        ("`The agent produced no output for …; raise lifecycle.hang_timeout or retry.`", True),
        ("`Cannot clone …: it has no tag …; check repository.tag.`", False),
        ("`The agent produced no input for …`", False),
    ],
)
def test_unknown_message_is_detected(texts: list[str], message: str, is_known: bool):
    assert (missing_fragments(message.strip("`"), texts) == []) == is_known
