"""Runs the real Claude Code with Sandbox's command line, outside a sandbox, in the test's own directories."""

import asyncio
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from doubles.manifests import claude as section
from sandbox.agents.claude_code.agent import find_binary
from sandbox.agents.claude_code.driver import PROGRAM, SANDBOX_HOME, SANDBOX_WORKSPACE, ClaudeCodeDriver
from sandbox.model.manifest.schema import Manifest, Metadata, Repository

SESSION_ID = "00000000-0000-4000-8000-0000000000aa"
GATEWAY_KEY = "sk-ant-sandbox-the-key-of-this-task"
RUN_SECONDS = 60.0
LINE_BYTES_MAX = 16 * 1024 * 1024


@dataclass
class RunResult:
    """The result of a run: `exit_code` is 128+n after signal n."""

    exit_code: int
    lines: list[bytes]
    stderr: bytes


@dataclass
class ClaudeOnHost:
    """Directories and user for an agent outside a sandbox."""

    directory: Path
    binary: Path = field(default_factory=find_binary)
    uid: int | None = None

    def __post_init__(self):
        for name in ("workspace", "home", "tmp"):
            (self.directory / name).mkdir()

    @property
    def workspace(self):
        return self.directory / "workspace"

    def host_path(self, text):
        """Replace a sandbox path with the path on the host."""
        for sandbox_path, host_location in (
            (SANDBOX_WORKSPACE, self.workspace),
            (SANDBOX_HOME, self.directory / "home"),
            (PROGRAM, self.binary),
        ):
            text = re.sub(rf"^{sandbox_path}(?=/|$)", str(host_location), text)
        return text

    def anonymize(self, data):
        """Replace host paths in the output of a run with sandbox paths."""
        names = [
            (self.workspace, SANDBOX_WORKSPACE),
            (self.directory / "home", SANDBOX_HOME),
            (self.directory / "tmp", "/tmp"),
        ]
        for host_location, sandbox_path in [*names, (self.binary, PROGRAM)]:
            for form in (str, lambda path: re.sub(r"[^A-Za-z0-9]", "-", str(path))):
                data = data.replace(form(host_location).encode(), form(sandbox_path).encode())
        return data

    def chown_directories(self):
        """Make the agent's uid the owner of its directories."""
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
        omitted_arguments=(),
        **claude,
    ):
        """Run the agent.

        on_line(line, process): called for each line of stdout. omitted_arguments: arguments of the command line that
            are left out.
        """
        spec = ClaudeCodeDriver(self.binary).prepare(
            manifest(prompt=prompt, subpath=subpath, **claude),
            session_id=SESSION_ID,
            gateway_key=GATEWAY_KEY,
            secrets=secrets or {},
        )
        for name, content in spec.home_files.items():
            path = self.directory / "home" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        argv = [self.host_path(argument) for argument in spec.command.argv if argument not in omitted_arguments]
        if self.uid is not None:
            self.chown_directories()
            # setpriv has capabilities when it executes `env`, but `env` has none when it executes the agent.
            argv = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "env", *argv]
        elif os.geteuid() == 0:
            environment = {"IS_SANDBOX": "1", **(environment or {})}
        variables = {name: self.host_path(value) for name, value in spec.command.environment.items()}
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=self.host_path(spec.command.directory),
            env={
                **variables,
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
            return await asyncio.wait_for(_communicate(process, spec.command.stdin, on_line), RUN_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _communicate(process, stdin, on_line):
    process.stdin.write(stdin)
    process.stdin.close()
    stderr = asyncio.create_task(process.stderr.read())
    lines = []
    while line := await process.stdout.readline():
        lines.append(line)
        if on_line is not None:
            on_line(line, process)
    code = await process.wait()
    return RunResult(code if code >= 0 else 128 - code, lines, await stderr)


def manifest(*, prompt="Do it.", subpath=None, **claude):
    return Manifest(
        metadata=Metadata(name="A task"),
        repository=Repository(url="https://example.org/repo.git", branch="main", subpath=subpath),
        agent=section(prompt=prompt, **claude),
    )
