"""The driver of the scripted agent."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sandbox.interfaces.agent import (
    AgentEvent,
    AgentLaunchSpec,
    AgentOutcome,
    ParsedToolCallEnd,
    TurnStarted,
)
from sandbox.interfaces.gateway import MODEL_PORT
from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE, Command, ExitStatus
from sandbox.model.events import ToolCallStarted
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest

PROGRAM = "/run/sandbox/bin/scripted"


class SecondAgentDriver:
    """Implements `AgentDriver`."""

    gateway_key_prefix = "sandbox-"

    def __init__(self, program: Path) -> None:
        self._program = program

    def prepare(
        self,
        manifest: Manifest,
        *,
        session_id: str,
        gateway_key: str,
        secrets: Mapping[str, str],
        resumes: bool = False,
        session: bytes | None = None,
    ) -> AgentLaunchSpec:
        section = manifest.agent.settings
        environment = {
            **secrets,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": SANDBOX_HOME,
            "RESPONSES_URL": f"http://127.0.0.1:{MODEL_PORT}/v1/responses",
            "RESPONSES_API_KEY": gateway_key,
        }
        command = Command(
            ("/usr/bin/python3", "-I", PROGRAM, section["model"], section["effort"]),
            environment,
            str(PurePosixPath(SANDBOX_WORKSPACE, manifest.repository.subpath or ".")),
            manifest.agent.prompt.encode(),
        )
        return AgentLaunchSpec(
            command,
            session_id,
            programs={self._program: PROGRAM},
            git_author="Scripted Agent",
            model_variables=frozenset({"RESPONSES_URL", "RESPONSES_API_KEY"}),
        )

    def has_session(self, home: Path, session_id: str) -> bool:
        return False

    def read_session(self, home: Path, session_id: str, bytes_max: int) -> bytes | None:
        return None

    def create_parser(self, session_id: str) -> "SecondAgentParser":
        return SecondAgentParser()

    def check_interactive_exit(self, exit_status: ExitStatus) -> Failure | None:
        return None if exit_status.code == 0 else Failure(FailureCode.AGENT_FAILED, "The scripted agent failed.")

    def render_output(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        return b""


class SecondAgentParser:
    """Parses lines such as `{"step": "call", "id": "1", "tool": "write_file"}`."""

    def __init__(self) -> None:
        self._end: dict[str, Any] | None = None

    def parse_line(self, line: bytes) -> Sequence[AgentEvent]:
        try:
            step = json.loads(line)
            match step["step"]:
                case "turn":
                    return (TurnStarted(),)
                case "call":
                    return (ToolCallStarted(step["tool"], step["id"]),)
                case "called":
                    return (ParsedToolCallEnd(step["id"], step["tool"], is_error=False),)
                case "end":
                    self._end = {"is_error": not step["ok"], "result": step["text"]}
        except (ValueError, TypeError, KeyError):
            pass
        return ()

    def outcome(self, exit_status: ExitStatus, stderr_tail: bytes) -> AgentOutcome:
        if exit_status.code == 0 and self._end is not None and not self._end["is_error"]:
            return AgentOutcome(self._end, None)
        text = stderr_tail.decode(errors="replace") if self._end is None else self._end["result"]
        return AgentOutcome(self._end, Failure(FailureCode.AGENT_FAILED, f"The scripted agent failed: {text}"))
