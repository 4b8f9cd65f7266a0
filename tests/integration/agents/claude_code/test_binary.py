"""The agent's own shell has the agent's uid. It must not reach into the agent all the same."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from doubles.claude_on_host import Outside
from sandbox.agents.claude_code.binary import find_binary, install_binary
from sandbox.demo.model_script import Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel

UID = 64_123

PROBE = """\
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
WAYS = ("environ", "exe", "maps", "mem", "stdout", "ptrace")


@pytest.fixture
def place():
    """A directory that any uid can get to."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def probe(place, binary):
    """Let the agent's shell try every way; gives what it said and the agent's own stdout."""

    async def run():
        (place / "run").mkdir(mode=0o755)
        outside = Outside(place / "run", binary=binary, uid=UID)
        (outside.workspace / "probe.py").write_text(PROBE)
        shell = Turn((ToolUse("Bash", {"command": "python3 -I probe.py", "description": "try"}),))
        async with ScriptedModel(Script((shell, Turn((Text("All done."),))))) as model:
            ran = await outside.run(model.url)
        assert ran.exit_code == 0, ran.stderr
        answer = model.messages[-1]["messages"][-1]["content"]
        said = next(block["content"] for block in answer if block["type"] == "tool_result")
        return said.partition("<system-reminder>")[0], b"".join(ran.lines)

    return asyncio.run(run())


def readable(binary):
    """The wheel's own binary, at a place that any uid can get to; a copy of its 400 MB only where it has to be."""
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the agent a uid of its own outside a sandbox")
def test_the_installed_binary_is_closed_to_the_agents_shell(place):
    said, stdout = probe(place, install_binary(place))
    assert said.split() == " ".join(f"{way} denied" for way in WAYS).split()
    assert b'\n{"type":"forged"}\n' not in stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the agent a uid of its own outside a sandbox")
def test_a_readable_binary_would_be_open(place):
    """The twin: without the execute-only copy each way works, the forged line included."""
    said, stdout = probe(place, readable(place / "claude"))
    assert said.split() == " ".join(f"{way} open" for way in WAYS).split()
    assert b'\n{"type":"forged"}\n' in stdout
