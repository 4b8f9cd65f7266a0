"""Records the output of the real Claude Code for the parser's tests; run by `script/record-conversations`."""

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from doubles.claude_on_host import ClaudeOnHost
from sandbox.agents.claude_code.agent import binary_version, find_binary
from sandbox.agents.claude_code.driver import MODEL_URL
from sandbox.demo.scripted_model import Fault, Script, ScriptedModel, Text, ToolUse, Turn

RECORDINGS = Path(__file__).parents[1] / "unit" / "agents" / "claude_code" / "recordings"
NO_RETRIES = {"CLAUDE_CODE_MAX_RETRIES": "0"}
SLEEP_SCRIPT = "import time; time.sleep(30)"


def bash(command, **options):
    return ToolUse("Bash", {"command": command, "description": "work", **options})


def end_during_tool(number):
    """Return a callback that sends a signal to Claude Code once the model has called a tool."""

    def on_line(line, process):
        if b'"tool_use"' in line and b'"assistant"' in line:
            asyncio.get_running_loop().call_later(0.5, process.send_signal, number)

    return on_line


DONE = Turn((Text("All done."),))
WORK = Turn((Text("Working."), bash("echo worked")))
DONE_CONTENT = {"content": DONE.content}
SUBAGENT = {"description": "look", "prompt": "SUBAGENT-BRANCH: look around", "subagent_type": "general-purpose"}

CASES = {
    "success_with_tools": {
        "turns": (
            Turn((Text("I read it."), ToolUse("Read", {"file_path": "notes.txt"}))),
            Turn((ToolUse("Edit", {"file_path": "notes.txt", "old_string": "hello", "new_string": "bye"}),)),
            Turn((bash("echo one"), bash("exit 3"))),
            Turn((ToolUse("NoSuchTool", {"a": 1}),)),
            DONE,
        )
    },
    "background_command": {
        "turns": (
            Turn((bash("python3 -c 'import time; time.sleep(1)'; echo late", run_in_background=True),)),
            Turn((Text("It runs; I wait."),)),
            DONE,
        )
    },
    "command_moved_to_background": {
        "turns": (
            Turn((bash("python3 -c 'import time; time.sleep(7)'; echo late", timeout=5000),)),
            Turn((Text("It runs; I wait."),)),
            DONE,
        )
    },
    "failed_background_command": {
        "turns": (
            Turn((bash("python3 -c 'import time; time.sleep(1)'; exit 3", run_in_background=True),)),
            Turn((Text("It runs; I wait."),)),
            DONE,
        )
    },
    "subagent_in_foreground": {
        "turns": (Turn((ToolUse("Agent", {**SUBAGENT, "run_in_background": False}),)), DONE),
        "branches": {"SUBAGENT-BRANCH": (Turn((bash("echo inside"),)), Turn((Text("Looked around."),)))},
    },
    "subagent_in_background": {
        "turns": (Turn((ToolUse("Agent", SUBAGENT),)), Turn((Text("It works; I wait."),)), DONE),
        "branches": {"SUBAGENT-BRANCH": (Turn((bash("echo inside"),)), Turn((Text("Looked around."),)))},
    },
    "max_turns": {"turns": (WORK, WORK, DONE), "claude": {"max_turns": 1}},
    "retried_500": {"turns": (Turn(faults=(Fault("error", 500, "Try again.", times=2),), **DONE_CONTENT),)},
    "retried_cut_stream": {"turns": (Turn(faults=(Fault("cut"),), **DONE_CONTENT),)},
    "overloaded_529": {
        "turns": (WORK, Turn(faults=(Fault("error", 529, "Overloaded", times=99),))),
        "environment": NO_RETRIES,
    },
    "key_refused_401": {
        "turns": (Turn(faults=(Fault("error", 401, "invalid x-api-key", times=99),)),),
        "environment": NO_RETRIES,
    },
    "forbidden_403": {"turns": (Turn(faults=(Fault("error", 403, "The account is closed.", times=99),)),)},
    "unknown_model_404": {"turns": (Turn(faults=(Fault("error", 404, "model: no-such-model", times=99),)),)},
    "refusal": {"turns": (Turn((Text("I can't."),), stop_reason="refusal"),) * 3},
    "ended_by_sigterm": {
        "turns": (Turn((bash(f'python3 -c "{SLEEP_SCRIPT}"'),)), DONE),
        "on_line": end_during_tool(signal.SIGTERM),
    },
    "ended_by_sigint": {
        "turns": (Turn((bash(f'python3 -c "{SLEEP_SCRIPT}"'),)), DONE),
        "on_line": end_during_tool(signal.SIGINT),
    },
    "ended_by_sigkill": {"turns": (Turn((bash("kill -9 $PPID; sleep 1"),)), DONE)},
}


async def record(turns, branches=None, claude=None, environment=None, on_line=None):
    """Run Claude Code once. Return stdout, exit code and stderr, with sandbox paths instead of the machine's."""
    with tempfile.TemporaryDirectory() as directory:
        outside = ClaudeOnHost(Path(directory))
        (outside.workspace / "notes.txt").write_text("hello\n")
        async with ScriptedModel(Script(turns, branches or {})) as model:
            result = await outside.run(model.url, environment=environment, on_line=on_line, **(claude or {}))
        stdout, stderr = (
            outside.anonymize(data).replace(_host(model.url), _host(MODEL_URL))
            for data in (b"".join(result.lines), result.stderr)
        )
        return stdout, result.exit_code, stderr.decode()


def _host(url):
    return url.removeprefix("http://").encode()


def main(names):
    """Record the named cases, or all cases."""
    RECORDINGS.mkdir(exist_ok=True)
    index_file = RECORDINGS / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    for name in names or CASES:
        stdout, exit_code, stderr = asyncio.run(record(**CASES[name]))
        (RECORDINGS / f"{name}.ndjson").write_bytes(stdout)
        index[name] = {"exit_code": exit_code, "stderr": stderr, "version": binary_version(find_binary())}
        print(f"{name}: {len(stdout.splitlines())} lines, exit code {exit_code}")
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
