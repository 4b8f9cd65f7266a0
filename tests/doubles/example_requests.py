"""Declarations of example requests, and the task that they refer to.

A test module in `tests/unit/api/routes` has the examples of its routes in `EXAMPLES`. `script/reference` records them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, FailureCode, FailureReason

TASK = "fix-tests"
MANIFEST: dict[str, Any] = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "Fix the tests", "id": TASK, "labels": {"team": "platform"}},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Fix the failing tests."},
}
PATCH = """\
diff --git a/src/parser.py b/src/parser.py
index 3f0a1c2..9b1d4e7 100644
--- a/src/parser.py
+++ b/src/parser.py
@@ -1,2 +1,4 @@
 def parse(tokens):
+    if not tokens:
+        return []
     return tokens[0]
"""
PATCH_ARTIFACT = Artifact(
    f"{TASK}.patch",
    f".sandbox/{TASK}.patch",
    len(PATCH),
    "text/x-diff",
    f"sha256:{hashlib.sha256(PATCH.encode()).hexdigest()}",
)

RUNNING_EVENTS: tuple[e.Event, ...] = (
    e.AttemptStarted("vcsbstbezmsq", "gvisor", "here"),
    e.WorkspacePrepared("9fceb02d0ae598e95dc970b74767f19372d61af8"),
    e.SandboxCreated("vcsbstbezmsq", "gvisor", "host"),
    e.AgentStarted("00000000-0000-0000-0000-000000000000", agent="Claude Code"),
    e.Progress(output_bytes=5210, tool_calls=5, turns=6, input_tokens=52_800, output_tokens=700, cost_usd=0.10626),
)
COMPLETED_EVENTS: tuple[e.Event, ...] = (
    *RUNNING_EVENTS,
    e.AgentExited(0, {"is_error": False, "num_turns": 6, "result": "The tests pass."}),
    e.ArtifactCollected(PATCH_ARTIFACT, DiffStatistics(1, 2, 0)),
    e.TaskFinished(),
)
_FAILURE = Failure(FailureCode.AGENT_FAILED, "Claude Code exited with code 1.", reason=FailureReason.AGENT_EXIT)
FAILED_EVENTS: tuple[e.Event, ...] = (
    *RUNNING_EVENTS,
    e.AgentExited(1, failure=_FAILURE),
    e.TaskFinished(),
)


@dataclass(frozen=True)
class Example:
    """A request to one operation, which must succeed. By default, the task `TASK` has completed.

    path_params, query, headers: values keyed by name. The path parameter `task_id` is `TASK`.
    body: JSON.
    events: the events of the task before the request; None if there is no task.
    is_sandbox_preserved: whether the task's sandbox is preserved.
    shown_lines_contain: if not empty, only those lines of a text response that contain this text are recorded.
    """

    operation: str
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    events: Sequence[e.Event] | None = COMPLETED_EVENTS
    is_sandbox_preserved: bool = False
    shown_lines_contain: str = ""
