"""The real Claude Code with Sandbox's own command line, but outside a sandbox: in directories of the test's own."""

import asyncio
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.agents.claude_code.binary import find_binary
from sandbox.agents.claude_code.driver import PROGRAM, SANDBOX_HOME, SANDBOX_WORKSPACE, ClaudeCodeDriver
from sandbox.model.manifest.schema import Claude, Manifest, Metadata, Repository

SESSION_ID = "00000000-0000-4000-8000-0000000000aa"
TASK_KEY = "sk-ant-sandbox-the-key-of-this-task"
RUN_SECONDS = 60.0
LINE_BYTES_MAX = 16 * 1024 * 1024


@dataclass
class Ran:
    """What a run left: `exit_code` is 128+n after signal n."""

    exit_code: int
    lines: list[bytes]
    stderr: bytes


@dataclass
class Outside:
    """Where the agent runs instead of a sandbox."""

    directory: Path
    binary: Path = field(default_factory=find_binary)
    uid: int | None = None

    def __post_init__(self):
        for name in ("workspace", "home", "tmp"):
            (self.directory / name).mkdir()

    @property
    def workspace(self):
        return self.directory / "workspace"

    def place(self, text):
        """A path inside as a path out here."""
        for inside, outside in (
            (SANDBOX_WORKSPACE, self.workspace),
            (SANDBOX_HOME, self.directory / "home"),
            (PROGRAM, self.binary),
        ):
            text = re.sub(rf"^{inside}(?=/|$)", str(outside), text)
        return text

    def scrub(self, data):
        """Bytes of a run, with the paths of a sandbox instead of this machine's."""
        names = [
            (self.workspace, SANDBOX_WORKSPACE),
            (self.directory / "home", SANDBOX_HOME),
            (self.directory / "tmp", "/tmp"),
        ]
        for outside, inside in [*names, (self.binary, PROGRAM)]:
            for form in (str, lambda path: re.sub(r"[^A-Za-z0-9]", "-", str(path))):
                data = data.replace(form(outside).encode(), form(inside).encode())
        return data

    def give_away(self):
        """Let the agent's uid own its directories."""
        subprocess.run(["chown", "-R", f"{self.uid}:{self.uid}", self.directory], check=True, timeout=10)

    async def run(
        self,
        model_url,
        *,
        prompt="Do it.",
        environment=None,
        secrets=None,
        subpath=None,
        on_line=None,
        without=(),
        **claude,
    ):
        """Run to the end. on_line(line, process) is told of each line of stdout; `without` leaves arguments out."""
        start = ClaudeCodeDriver(self.binary).prepare(
            manifest(prompt=prompt, subpath=subpath, **claude),
            session_id=SESSION_ID,
            task_key=TASK_KEY,
            secrets=secrets or {},
        )
        for name, content in start.home_files.items():
            path = self.directory / "home" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        argv = [self.place(argument) for argument in start.command.argv if argument not in without]
        if self.uid is not None:
            self.give_away()
            # One more program in between: setpriv still has its capabilities when it executes the next one.
            argv = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "env", *argv]
        elif os.geteuid() == 0:
            environment = {"IS_SANDBOX": "1", **(environment or {})}
        inside = {name: self.place(value) for name, value in start.command.environment.items()}
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=self.place(start.command.directory),
            env={
                **inside,
                "ANTHROPIC_BASE_URL": model_url,
                "TMPDIR": str(self.directory / "tmp"),
                **(environment or {}),
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
        )
        try:
            return await asyncio.wait_for(_follow(process, start.command.stdin, on_line), RUN_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _follow(process, stdin, on_line):
    process.stdin.write(stdin)
    process.stdin.close()
    stderr = asyncio.create_task(process.stderr.read())
    lines = []
    while line := await process.stdout.readline():
        lines.append(line)
        if on_line is not None:
            on_line(line, process)
    code = await process.wait()
    return Ran(code if code >= 0 else 128 - code, lines, await stderr)


def manifest(*, prompt="Do it.", subpath=None, **claude):
    return Manifest(
        version="1",
        kind="Task",
        metadata=Metadata(name="A task"),
        repository=Repository(url="https://example.org/repo.git", branch="main", subpath=subpath),
        claude=Claude(prompt=prompt, **claude),
    )
