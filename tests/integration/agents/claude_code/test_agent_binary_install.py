"""The agent's shell has the agent's uid, but must not access the agent's process."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from doubles.claude_on_host import ClaudeOnHost
from sandbox.agents.claude_code.agent import find_binary, install_binary
from sandbox.demo.scripted_model import Script, ScriptedModel, Text, ToolUse, Turn

UID = 64_123

ACCESS_CHECK = """\
import ctypes, os
pid = int(os.environ["CLAUDE_PID"])
libc = ctypes.CDLL(None, use_errno=True)
for name in ("environ", "exe", "maps", "mem"):
    try:
        os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
        print(name, "open")
    except PermissionError:
        print(name, "denied")
PIDFD_GETFD = 438
stdout = libc.syscall(PIDFD_GETFD, os.pidfd_open(pid), 1, 0)
if stdout >= 0:
    os.write(stdout, b'{"type":"forged"}\\n')
print("stdout", "denied" if stdout < 0 else "open")
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
print("ptrace", "denied" if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) else "open")
"""
TARGETS = ("environ", "exe", "maps", "mem", "stdout", "ptrace")


@pytest.fixture
def directory():
    """A directory that every uid can access."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def run_access_check(directory, binary):
    """Run the access check in the agent's shell; return its output and the agent's stdout."""

    async def run():
        (directory / "run").mkdir(mode=0o755)
        host_run = ClaudeOnHost(directory / "run", binary=binary, uid=UID)
        (host_run.workspace / "access_check.py").write_text(ACCESS_CHECK)
        shell = Turn((ToolUse("Bash", {"command": "python3 -I access_check.py", "description": "try"}),))
        async with ScriptedModel(Script((shell, Turn((Text("All done."),))))) as model:
            completed = await host_run.run(model.url)
        assert completed.exit_code == 0, completed.stderr
        content = model.messages[-1]["messages"][-1]["content"]
        output = next(block["content"] for block in content if block["type"] == "tool_result")
        return output.partition("<system-reminder>")[0], b"".join(completed.lines)

    return asyncio.run(run())


def readable_copy(binary):
    """Return the wheel's binary in a directory that every uid can access. Copy its 400 MB only if necessary."""
    source = find_binary()
    try:
        if source.stat().st_mode & 0o005 == 0o005:
            binary.hardlink_to(source)
            return binary
    except OSError:  # another file system
        pass
    shutil.copyfile(source, binary)
    binary.chmod(0o755)
    return binary


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the agent a separate uid outside a sandbox")
def test_shell_of_the_agent_cannot_access_the_process_of_the_installed_binary(directory):
    output, stdout = run_access_check(directory, install_binary(directory))
    assert output.split() == " ".join(f"{target} denied" for target in TARGETS).split()
    assert b'\n{"type":"forged"}\n' not in stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the agent a separate uid outside a sandbox")
def test_shell_of_the_agent_can_access_the_process_of_a_readable_binary(directory):
    """The control: without the execute-only copy, every access succeeds and the forged line reaches stdout."""
    output, stdout = run_access_check(directory, readable_copy(directory / "claude"))
    assert output.split() == " ".join(f"{target} open" for target in TARGETS).split()
    assert b'\n{"type":"forged"}\n' in stdout
