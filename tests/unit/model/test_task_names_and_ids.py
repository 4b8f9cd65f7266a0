"""Names of tasks that are made from their prompts."""

import time

import pytest

from doubles.manifests import NAMES_BY_PROMPT
from sandbox.model.task_names_and_ids import branch_name, is_name_from_prompt, name_from_prompt


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


GENERATED_ID = "5e173eb5-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("task_id", "name", "branch"),
    [
        (GENERATED_ID, "Fix the login: 404 & more", "sandbox/fix-the-login-404-more-5e173eb5"),
        (GENERATED_ID, "Übersetze es", "sandbox/ubersetze-es-5e173eb5"),
        (GENERATED_ID, "翻訳", "sandbox/5e173eb5"),
        (GENERATED_ID, "$(reboot) `x`; ../..", "sandbox/reboot-x-5e173eb5"),
        (GENERATED_ID, "word " * 20, f"sandbox/{'-'.join(['word'] * 8)}-5e173eb5"),
        (GENERATED_ID, "w" * 60, f"sandbox/{'w' * 40}-5e173eb5"),
        ("fix-tests", "Fix the tests", "sandbox/fix-tests"),
        ("v1.2", "Fix the tests", "sandbox/v1.2"),
        ("yarn.lock", "Fix the lock file", "sandbox/yarn-lock"),
    ],
)
def test_branch_is_named_after_the_task(task_id, name, branch):
    assert branch_name(task_id, name) == branch
