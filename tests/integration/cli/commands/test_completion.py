"""Shell completion in a real bash, and the modules that it imports."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from doubles.fake_api import error_response, json_response
from doubles.sample_task import task_status


@pytest.fixture
def complete(environment, tmp_path):
    """Return bash's completions for the words of an incomplete command line."""
    program = tmp_path / "bin" / "sandbox"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -I\nfrom sandbox.cli.main import main\nmain()\n")
    program.chmod(0o755)

    def run(*words: str) -> list[str]:
        line = " ".join(map(shlex.quote, words))
        script = (
            f'eval "$(sandbox completion bash)"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; '
            "complete -p sandbox >/dev/null && _sandbox_completion sandbox; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        path = f"{program.parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", script], env={**environment, "PATH": path}, capture_output=True, timeout=60, check=True
        )
        assert result.stderr == b""
        return result.stdout.decode().split()

    return run


def test_bash_completes_commands_options_and_their_values(complete):
    assert complete("sandbox", "ta") == ["task"]
    assert complete("sandbox", "task", "s") == ["submit", "status", "shell"]
    assert complete("sandbox", "task", "list", "--st") == ["--state"]
    assert complete("sandbox", "task", "logs", "x", "--stream", "std") == ["stdout", "stderr"]
    assert complete("sandbox", "completion", "") == ["bash", "zsh", "fish"]


def test_bash_completes_task_ids(complete, api):
    invalid = ("fix-\x1b[31m", "fix-;touch${IFS}ran", "fix-$(touch${IFS}ran)", "fix-..")
    tasks = [task_status("running", task_id=task_id) for task_id in ("fix-1", "fix-2", "other", *invalid)]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 4}))
    assert complete("sandbox", "task", "status", "fix") == ["fix-1", "fix-2"]


def test_bash_completes_contexts(complete, tmp_path):
    file = tmp_path / ".config" / "sandbox" / "contexts.json"
    file.parent.mkdir(parents=True)
    contexts = {name: {"server": "http://localhost"} for name in ("prod", "preview", "other")}
    file.write_text(json.dumps({"version": 1, "current": "default", "contexts": contexts}))
    file.chmod(0o644)
    assert complete("sandbox", "context", "use", "p") == []
    file.chmod(0o600)
    assert complete("sandbox", "context", "use", "p") == ["prod", "preview"]
    assert complete("sandbox", "--context", "") == ["default", "prod", "preview", "other"]
    assert complete("sandbox", "task", "list", "--context", "o") == ["other"]


def test_unusable_context_yields_no_completions_and_no_errors(complete, environment):
    environment["SANDBOX_CONTEXT"] = "missing"
    assert complete("sandbox", "task", "status", "") == []


def test_failing_server_yields_no_completions_and_no_errors(complete, api):
    api.on("GET", "/tasks", error_response(401, "unauthorized", "Unauthorized."))
    assert complete("sandbox", "task", "status", "") == []
    assert complete("sandbox", "--server", "http://127.0.0.1:9", "task", "status", "") == []


@pytest.mark.parametrize(
    ("shell", "first_line"), [("zsh", b"#compdef sandbox"), ("fish", b"complete --no-files --command")]
)
def test_zsh_and_fish_have_completion_scripts(run_cli, shell, first_line):
    result = run_cli("completion", shell)
    assert (result.returncode, result.stderr) == (0, b"")
    assert first_line in result.stdout


@pytest.mark.parametrize("words", ["sandbox ", "sandbox task s", "sandbox serve --", "sandbox task submit --"])
def test_completion_does_not_import_the_server(words):
    script = (
        "import os, sys\n"
        f"os.environ.update(_SANDBOX_COMPLETE='bash_complete', COMP_WORDS={words!r}, "
        f"COMP_CWORD='{words.count(' ')}')\n"
        "from sandbox.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "slow = ('fastapi', 'uvicorn', 'pydantic', 'httpx2', 'rich', 'yaml', 'asyncio', 'sandbox.bootstrap.server')\n"
        "print('LOADED', [name for name in slow if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    *completions, loaded = process.stdout.splitlines()
    assert (loaded, bool(completions)) == ("LOADED []", True)
