"""The tutorial, typed as it stands there: what it says comes out."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.live_server import lay_agent_ready
from sandbox.demo.processes import start_server

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
EXPORTS = dict(re.findall(r'^export ([A-Z_]+)="?([^"$\n]+)"?$', PAGE, re.MULTILINE))


def blocks(section, language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [body for spoken, body in fences if spoken == language]


def section(word):
    (found,) = [text for title, text in SECTIONS.items() if word in title]
    return found


class Newcomer:
    """Somebody at terminal 3, with the files and the variables that the tutorial gave them."""

    def __init__(self, home, server, repository_url):
        self._here = home
        self._repository_url = repository_url
        binaries = Path(sys.executable).parent
        self._environment = {
            "HOME": str(home),
            "SANDBOX_SERVER": server,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "COLUMNS": "200",  # a line that is told is not broken
        }

    def type(self, text, answer="", is_well=True):
        """Run what a block says in a terminal; `answer` is typed meanwhile. Gives what the terminal shows."""
        lines = self.with_address(text) + '\npwd > "$HOME/here"\n'
        terminal = ["script", "-qec", f"bash -exc {shlex.quote(lines)}", "/dev/null"]
        ran = subprocess.run(
            terminal,
            cwd=self._here,
            env=self._environment,
            input=answer.encode(),
            capture_output=True,
            timeout=110,
            check=False,
        )
        shown = re.sub(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\r", "", ran.stdout.decode())
        assert (ran.returncode == 0) == is_well, shown
        if is_well:
            self._here = Path((Path(self._environment["HOME"]) / "here").read_text().strip())
        return shown

    def write(self, name, text):
        (self._here / name).write_text(self.with_address(text))

    def with_address(self, text):
        return text.replace("http://127.0.0.1:8130/example.git", self._repository_url)


@pytest.fixture
def newcomer(tmp_path):
    (tmp_path / "home").mkdir()
    lay_agent_ready(tmp_path / "data")
    command = [sys.executable, "-m", "sandbox.demo.playground", "--git-port", "0", "--model-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as playground:
        try:
            repository_url, model_url = [playground.stdout.readline().split()[1] for _ in range(2)]
            variables = {**EXPORTS, "ANTHROPIC_BASE_URL": model_url, "SANDBOX_RUNTIME": "bubblewrap"}
            with start_server(tmp_path / "data", variables) as server:
                yield Newcomer(tmp_path / "home", server["http"], repository_url)
        finally:
            playground.terminate()


@pytest.mark.timeout(300)
def test_from_a_clone_to_a_patch_a_secret_a_refused_host_and_a_look_into_a_failure(newcomer):
    clone, run, proof, files = blocks(section("A task from a checkout"), "sh")
    newcomer.type(clone, is_well=False)  # the last command is the test that fails
    newcomer.type("cd ~/sandbox-tutorial")
    shown = newcomer.type(run, answer="y\n")
    assert "Applied to 2 files and staged." in shown
    assert "OK" in newcomer.type(proof)
    assert "transcript.ndjson" in newcomer.type(files)

    newcomer.write("greeting.yaml", *blocks(section("A secret"), "yaml"))
    (told,) = blocks(section("A secret"), "")
    assert f"\n{told}" in newcomer.type(*blocks(section("A secret"), "sh"))

    newcomer.write("fetch.yaml", *blocks(section("An allowed host"), "yaml"))
    refused, _ = blocks(section("An allowed host"), "sh")  # the other one would leave the machine
    (told,) = blocks(section("An allowed host"), "")
    assert told in newcomer.type(refused)

    dear, shell, rest = blocks(section("A failure"), "sh")
    (told,) = blocks(section("A failure"), "")
    assert told in newcomer.type(dear, is_well=False)
    shown = newcomer.type(shell, answer="git status --short\ncat basket.py\nexit\n")
    assert "return sum(prices)" in shown
    assert "is released" in newcomer.type(rest)
