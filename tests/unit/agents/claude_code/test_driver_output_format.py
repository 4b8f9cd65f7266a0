"""The task's stdout for each value of `claude.output_format`."""

import json
from pathlib import Path

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver

RESULT = {"type": "result", "is_error": False, "result": "All done.\nReally — ✓", "total_cost_usd": 0.5}
MAX_TURNS_REACHED = {"type": "result", "is_error": True, "errors": ["Reached maximum number of turns (2)"]}


def render(output_format, result):
    return ClaudeCodeDriver(Path("/none")).render_output(manifest(output_format=output_format), result)


def test_text_format_contains_the_result_text():
    assert render("text", RESULT) == "All done.\nReally — ✓\n".encode()


def test_text_format_of_a_failed_run_contains_the_error():
    assert render("text", MAX_TURNS_REACHED) == b"Reached maximum number of turns (2)\n"


@pytest.mark.parametrize(
    "result", [{}, {"result": None}, {"result": 7, "errors": "x"}, {"errors": []}, {"errors": [1]}]
)
def test_result_without_text_renders_nothing(result):
    assert render("text", result) == b""


@pytest.mark.parametrize("result", [RESULT, MAX_TURNS_REACHED])
def test_json_format_contains_the_result_on_one_line(result):
    rendered = render("json", result)
    assert rendered.endswith(b"}\n")
    assert rendered.count(b"\n") == 1
    assert json.loads(rendered) == result


@pytest.mark.parametrize("output_format", ["text", "json", "stream-json"])
def test_missing_result_renders_nothing(output_format):
    assert render(output_format, None) == b""


def test_stream_json_format_renders_nothing():
    assert render("stream-json", RESULT) == b""
