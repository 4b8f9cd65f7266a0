"""The task's stdout as `claude.output_format` wants it."""

import json
from pathlib import Path

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver

RESULT = {"type": "result", "is_error": False, "result": "All done.\nReally — ✓", "total_cost_usd": 0.5}
TURNS_OVER = {"type": "result", "is_error": True, "errors": ["Reached maximum number of turns (2)"]}


def render(output_format, result):
    return ClaudeCodeDriver(Path("/none")).render_output(manifest(output_format=output_format), result)


def test_text_is_the_words_of_the_result():
    assert render("text", RESULT) == "All done.\nReally — ✓\n".encode()


def test_text_of_a_run_that_was_stopped_says_why():
    assert render("text", TURNS_OVER) == b"Reached maximum number of turns (2)\n"


@pytest.mark.parametrize(
    "result", [{}, {"result": None}, {"result": 7, "errors": "x"}, {"errors": []}, {"errors": [1]}]
)
def test_a_result_without_words_is_rendered_as_nothing(result):
    assert render("text", result) == b""


@pytest.mark.parametrize("result", [RESULT, TURNS_OVER])
def test_json_is_the_result_on_one_line(result):
    rendered = render("json", result)
    assert rendered.endswith(b"}\n")
    assert rendered.count(b"\n") == 1
    assert json.loads(rendered) == result


@pytest.mark.parametrize("output_format", ["text", "json", "stream-json"])
def test_without_a_result_there_is_nothing(output_format):
    assert render(output_format, None) == b""


def test_the_stream_of_events_is_not_rendered():
    assert render("stream-json", RESULT) == b""
