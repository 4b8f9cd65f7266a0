"""Names of tasks that are made from their prompts."""

import time

import pytest

from doubles.manifests import NAMES_BY_PROMPT
from sandbox.model.name_from_prompt import is_name_from_prompt, name_from_prompt


@pytest.mark.parametrize(("prompt", "name"), NAMES_BY_PROMPT.items())
def test_name_is_the_first_line_of_the_prompt_cut_at_a_word(prompt: str, name: str):
    assert name_from_prompt(prompt) == name


@pytest.mark.parametrize("text", [": " * 250_000 + "x", "x" + " " * 500_000 + "x", "#" * 500_000 + "x"])
def test_name_is_built_quickly_from_a_long_line(text: str):
    begin = time.process_time()
    assert name_from_prompt(f"Fix {text}").startswith("Fix")
    assert is_name_from_prompt("Fix…", f"Fix {text}")
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("name", "is_from_prompt"),
    [("Fix the login", True), ("Fix the l…", True), ("Fix", False), ("…", False), ("", False), ("Other…", False)],
)
def test_name_from_the_prompt_is_recognized(name: str, is_from_prompt: bool):
    assert is_name_from_prompt(name, "# Fix the login:\nBe quick.") is is_from_prompt
