"""The demo's script matches the demo's repository: the tests fail before the script runs and pass afterwards."""

import subprocess
import sys

import msgspec
import pytest

from sandbox.demo.scripted_model import Fault, Script, ToolUse, Turn, example_script, load_script
from sandbox.demo.walkthrough import FILES


@pytest.fixture
def project(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run_tests(project):
    command = [sys.executable, "-m", "unittest"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30, check=False)


TASK_TURN_COUNT = 6
"""The number of turns in the first task. The other turns are for a task that continues the first task."""


def calls(turns):
    return [block for turn in turns for block in turn.content if isinstance(block, ToolUse)]


def edit(project, turns):
    for call in calls(turns):
        if call.name == "Edit":
            path = project / call.input["file_path"]
            assert path.read_text().count(call.input["old_string"]) == 1
            path.write_text(path.read_text().replace(call.input["old_string"], call.input["new_string"]))
        elif call.name == "Write":
            path = project / call.input["file_path"]
            assert not path.exists()
            path.write_text(call.input["content"])


def test_bug_makes_a_test_fail(project):
    result = run_tests(project)
    assert result.returncode == 1
    assert "1369" in result.stderr


def test_scripted_edits_make_all_tests_pass(project):
    edit(project, example_script().turns[:TASK_TURN_COUNT])
    result = run_tests(project)
    assert result.returncode == 0, result.stderr
    assert "Ran 3 tests" in result.stderr


def test_continuation_changes_the_code_and_all_tests_pass(project):
    turns = example_script().turns
    edit(project, turns[:TASK_TURN_COUNT])
    before = (project / "basket.py").read_text()
    edit(project, turns[TASK_TURN_COUNT:])
    assert (project / "basket.py").read_text() != before
    result = run_tests(project)
    assert result.returncode == 0, result.stderr
    assert "Ran 4 tests" in result.stderr
    assert turns[-1].effective_stop_reason == "end_turn"
    assert "scripted model" in turns[-1].content[0].text


def test_script_is_short_and_fast():
    turns = example_script().turns[:TASK_TURN_COUNT]
    assert [call.name for call in calls(turns)] == ["Bash", "Read", "Edit", "Write", "Bash"]
    assert sum(turn.delay_seconds + turn.block_delay_seconds * (len(turn.content) + 2) for turn in turns) < 5
    assert turns[-1].effective_stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("prompt", "command"),
    [
        ("Print the secret in GREETING and its length. Change nothing.", "GREETING"),
        ("Fetch https://example.com/ with curl and report the status. Change nothing.", "https://example.com/"),
        ("The tests fail. Fix them.", "python3 -m unittest"),
    ],
)
def test_script_handles_tutorial_prompts(prompt, command):
    script = example_script()
    first = script.turn(script.branch(prompt), 0)
    assert [command in block.input["command"] for block in first.content if isinstance(block, ToolUse)] == [True]
    assert script.turn(script.branch(prompt), 1).content


def test_script_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "script.json"
    path.write_bytes(msgspec.json.encode(example_script()))
    assert load_script(path) == example_script()


def test_invalid_script_is_rejected(tmp_path):
    path = tmp_path / "script.json"
    path.write_text('{"turns": [{"content": [{"type": "song"}]}]}')
    with pytest.raises(msgspec.ValidationError, match="song"):
        load_script(path)


def test_turn_has_a_stop_reason():
    assert Turn((ToolUse("Bash", {}),)).effective_stop_reason == "tool_use"
    assert Turn().effective_stop_reason == "end_turn"
    assert Turn(stop_reason="refusal").effective_stop_reason == "refusal"


def test_faults_apply_in_order():
    error, cut = Fault("error", times=2), Fault("cut")
    turn = Turn(faults=(error, cut))
    assert [turn.fault(attempt) for attempt in range(5)] == [error, error, cut, None, None]


def test_turn_after_the_last_scripted_turn_ends_the_conversation():
    assert Script(()).turn("", 3).effective_stop_reason == "end_turn"
