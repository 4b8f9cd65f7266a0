"""The sequence that resets the terminal, in a real terminal."""

import shutil
import subprocess
import sys

import pytest

from doubles.deployment import wait_until

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")

PROGRAM = """
import os, sys, time
from sandbox.cli.sandbox_terminal import _RESET
sys.stdout.write({before!r})
sys.stdout.flush()
os.write(1, _RESET)
print("after the reset", flush=True)
time.sleep(60)
"""


@pytest.fixture
def show(tmp_path):
    """Return a function that runs a program, which resets the terminal, and returns the lines of the terminal."""
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]

    def run(*arguments):
        return subprocess.run([*tmux, *arguments], capture_output=True, timeout=20, check=True).stdout.decode()

    def show(before):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(before=before))
        run("new-session", "-d", "-s", "test", "-x", "60", "-y", "20", sys.executable, str(program))
        wait_until(lambda: "after the reset" in run("capture-pane", "-p", "-t", "test"), 20, "the reset")
        return run("capture-pane", "-p", "-t", "test").rstrip().split("\n")

    yield show
    subprocess.run([*tmux, "kill-server"], capture_output=True, timeout=20, check=False)


def test_reset_does_not_restore_a_position_that_an_earlier_program_saved(show):
    pager = "pager\n\x1b[?1049h a page \x1b[?1049l"

    assert show(f"{pager}one\ntwo\nthree\n") == ["pager", "one", "two", "three", "after the reset"]


def test_reset_leaves_the_alternate_screen_and_restores_the_position(show):
    assert show("one\ntwo\n\x1b[?1049h\x1b[10;10Ha page") == ["one", "two", "after the reset"]


@pytest.mark.parametrize("string", ["\x1bP+q", "\x1b]0;title", "\x1b_application", "\x1b^message", "\x1bX"])
def test_reset_ends_a_string_that_a_program_left_open(show, string):
    assert show(f"one\n\x1b[?1049h a page{string}") == ["one", "after the reset"]
