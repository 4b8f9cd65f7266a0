"""The commands of the tutorial produce the documented output."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
EXPORTS = dict(re.findall(r'^export ([A-Z_]+)="?([^"$\n]+)"?$', PAGE, re.MULTILINE))


def blocks(section, language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [body for fence_language, body in fences if fence_language == language]


def section(title_part):
    (found,) = [text for title, text in SECTIONS.items() if title_part in title]
    return found


class TutorialUser:
    """Runs commands as a user does in the tutorial's terminal, with that terminal's files and variables."""

    def __init__(self, home, server, repository_url):
        self.home = home
        self._directory = home
        self._repository_url = repository_url
        binaries = Path(sys.executable).parent
        self._environment = {
            "HOME": str(home),
            "SANDBOX_SERVER": server,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "COLUMNS": "200",  # documented lines are not wrapped
            "PAGER": "cat",
        }

    def type(self, text, stdin_text="", is_success=True):
        """Run a block of commands in a terminal with `stdin_text` as input; return the output of the terminal."""
        lines = self.with_address(text) + '\npwd > "$HOME/here"\n'
        terminal = ["script", "-qec", f"stty columns 200; bash -exc {shlex.quote(lines)}", "/dev/null"]
        result = subprocess.run(
            terminal,
            cwd=self._directory,
            env=self._environment,
            input=stdin_text.encode(),
            capture_output=True,
            timeout=110,
            check=False,
        )
        output = re.sub(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\r", "", result.stdout.decode())
        assert (result.returncode == 0) == is_success, output
        if is_success:
            self._directory = Path((Path(self._environment["HOME"]) / "here").read_text().strip())
        return output

    def write(self, name, text):
        (self._directory / name).write_text(self.with_address(text))

    def with_address(self, text):
        return text.replace("http://127.0.0.1:8130/example.git", self._repository_url)


@pytest.fixture
def user(tmp_path):
    """A user who has finished section 1 of the tutorial, with servers on free ports."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **EXPORTS,
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "SANDBOX_RUNTIME": "bubblewrap",
        "LANG": "C.UTF-8",
    }
    sandbox = [sys.executable, "-m", "sandbox", "demo"]
    options = {"env": environment, "timeout": 110}
    try:
        ports = ("--port", "0", "--ws-port", "0", "--git-port", "0")
        started = subprocess.run([*sandbox, "--keep", *ports], check=False, capture_output=True, text=True, **options)
        assert started.returncode == 0, started.stdout + started.stderr
        assert "***" not in started.stdout
        (expected,) = blocks(section("Install Sandbox"), "")
        addresses = dict(re.findall(r"^  (Dashboard|Repository) +(\S+)$", started.stdout, re.MULTILINE))
        shown = started.stdout.replace(addresses["Repository"], "http://127.0.0.1:8130/example.git")
        shown = shown.replace(addresses["Dashboard"], "http://127.0.0.1:8122")
        assert expected in shown.replace(" --server http://127.0.0.1:8122", "")  # the default address needs no option
        yield TutorialUser(home, addresses["Dashboard"], addresses["Repository"])
    finally:
        subprocess.run([*sandbox, "--stop"], check=False, **options)


@pytest.mark.timeout(300)
def test_tutorial_commands_produce_the_documented_output(user):
    clone, run, proof, files = blocks(section("A task from a checkout"), "sh")
    user.type(clone, is_success=False)  # the last command of the block is the failing test
    user.type("cd ~/sandbox-tutorial")
    output = user.type(run, stdin_text="y\n")
    assert "Applied to 2 files and staged." in output
    assert "OK" in user.type(proof)
    assert "transcript.ndjson" in user.type(files)

    ask, show, commit = blocks(section("Ask for a change"), "sh")
    user.type(ask)
    output = user.type(show)
    assert "+++ b/test_negative_prices.py" in output
    assert "test_small_baskets.py" not in output.partition("sandbox task status")[0]
    assert re.search(r"^Cost +\$\d", output, re.MULTILINE)
    output = user.type(commit)
    assert re.search(r"test_negative_prices.py +\|", output)
    assert re.search(r"test_small_baskets.py +\|", output)

    user.write("greeting.yaml", *blocks(section("A secret"), "yaml"))
    (expected,) = blocks(section("A secret"), "")
    assert f"\n{expected}" in user.type(*blocks(section("A secret"), "sh"))

    user.write("fetch.yaml", *blocks(section("An allowed host"), "yaml"))
    refused, _ = blocks(section("An allowed host"), "sh")  # the other block needs internet access
    (expected,) = blocks(section("An allowed host"), "")
    assert expected in user.type(refused)

    expensive, shell, rest = blocks(section("failed task"), "sh")
    (expected,) = blocks(section("failed task"), "")
    assert expected in user.type(expensive, is_success=False)
    output = user.type(shell, stdin_text="git status --short\ncat basket.py\nexit\n")
    assert "return sum(prices)" in output
    assert "is released" in user.type(rest)

    output = user.type(*blocks(section("Clean up"), "sh"))
    assert "The demo's servers have stopped" in output
    assert not (user.home / "sandbox-tutorial").exists()
    assert not (user.home / ".local" / "state" / "sandbox" / "demo").exists()
