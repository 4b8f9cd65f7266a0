"""The events of one task, a small bug fix, as a client receives them."""

import json
from typing import Any

TASK_ID = "fix-42"
TOOL_CALL_DEFAULTS: dict[str, Any] = {
    "command": None,
    "edits": [],
    "input": {},
    "parent_tool_use_id": None,
    "omitted_characters": 0,
    "omitted_fields": 0,
}
RESULT: dict[str, Any] = {
    "text": "Fixed.",
    "is_error": False,
    "reason": "",
    "turns": 4,
    "duration_ms": None,
    "cost_usd": None,
    "omitted_characters": 0,
}
PYTEST = "python3 -m pytest -q tests/test_parser.py"
COMMIT_COMMAND = "python3 -m pytest -q && git add -A && git commit -q -m 'Fix the empty input' " * 3


def task_events(task_id: str = TASK_ID) -> list[dict[str, Any]]:
    """Return the events from submission to `end`, numbered from 1."""
    events: list[dict[str, Any]] = []

    def add(event_type: str, **fields: Any) -> None:
        seq = len(events) + 1
        events.append({"type": event_type, "task_id": task_id, "seq": seq, "timestamp": _at(seq), **fields})

    def state(previous: str | None, new: str, message: str) -> None:
        add("state_change", previous_state=previous, new_state=new, state_message=message)

    def line(event: dict[str, Any], stream: str = "stdout") -> None:
        data = json.dumps(event, ensure_ascii=False) + "\n"
        add("output", stream=stream, data=data, bytes=len(data.encode()), continued=False, parsed=True)

    def agent_message(text: str) -> None:
        line({"type": "assistant", "message": {"id": "m", "content": [{"type": "text", "text": text}]}})
        add("agent_message", text=text, kind="text", parent_tool_use_id=None, omitted_characters=0)

    def tool_use(use_id: str, tool: str, summary: str, **fields: Any) -> None:
        line({"type": "assistant", "message": {"id": "m", "content": [{"type": "tool_use", "id": use_id}]}})
        add("tool_call_started", tool=tool, tool_use_id=use_id, summary=summary, **{**TOOL_CALL_DEFAULTS, **fields})

    def tool_result(use_id: str, tool: str, duration_ms: int, error: str | None = None) -> None:
        is_error = error is not None
        block = {"type": "tool_result", "tool_use_id": use_id, "content": error or "ok", "is_error": is_error}
        line({"type": "user", "message": {"role": "user", "content": [block]}})
        result = {"output": error or "ok", "exit_code": 1 if is_error else None, "omitted_characters": 0}
        add("tool_result", tool_use_id=use_id, is_error=is_error, in_background=False, **result)
        add("tool_call", tool=tool, tool_use_id=use_id, duration_ms=duration_ms, is_error=is_error)

    def usage(tokens_in: int, tokens_out: int, usd: float) -> None:
        add(
            "usage",
            model="claude-sonnet-4-5-20250929",
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            cache_read_tokens=0,
            cache_write_tokens=0,
            cost_usd=usd,
        )

    state(None, "pending", "Waiting to be started")
    state("pending", "staging", "Cloning https://github.com/org/app.git")
    state("staging", "provisioning", "Creating the sandbox")
    state("provisioning", "ready", "The sandbox is ready")
    state("ready", "running", "Claude Code is working")
    line({"type": "system", "subtype": "init", "session_id": "s", "tools": ["Bash"]})
    agent_message("I'll look at the failing test first, then at the parser that it exercises.")
    usage(12_040, 88, 0.0374)
    tool_use("t1", "Bash", PYTEST, command=PYTEST, input={"description": "Run the failing test"})
    tool_result(
        "t1", "Bash", 1230, "Exit code 1\nFAILED tests/test_parser.py::test_empty - IndexError: list index out of range"
    )
    tool_use("t2", "Read", "src/app/parser.py", input={"file_path": "/workspace/src/app/parser.py"})
    tool_result("t2", "Read", 12)
    agent_message(
        "The parser indexes into the tokens before it checks that there are any.\n\nI'll return early instead."
    )
    tool_use("t3", "Edit", "src/app/parser.py", edits=[{"path": "src/app/parser.py", "old": "a", "new": "b"}])
    tool_result("t3", "Edit", 25)
    add("egress_denied", host="telemetry.example.com", port=443, reason="not in allowed_hosts")
    tool_use("t4", "Bash", COMMIT_COMMAND, command=COMMIT_COMMAND)
    tool_result("t4", "Bash", 14_120)
    usage(14_871, 502, 0.0521)
    agent_message("Fixed: an empty input now gives an empty list. All 128 tests pass.")
    line({"type": "result", "subtype": "success", "is_error": False, "num_turns": 4, "result": "Fixed."})
    add("agent_result", **RESULT)
    state("running", "completing", "Collecting artifacts")
    state("completing", "completed", "Claude Code finished its work")
    add("end", state="completed", exit_code=0, error=None)
    return events


def task_status(state: str, task_id: str = TASK_ID, **changes: Any) -> dict[str, Any]:
    """Return the task as returned by `GET /tasks/{id}`."""
    return {
        "id": task_id,
        "name": "Fix bug #42",
        "state": state,
        "labels": {"team": "platform"},
        "created_at": "2026-01-29T10:10:01.000Z",
        "started_at": "2026-01-29T10:10:05.000Z" if state not in {"pending", "staging"} else None,
        "finished_at": "2026-01-29T10:10:32.000Z" if state in {"completed", "failed", "cancelled"} else None,
        "state_changed_at": "2026-01-29T10:10:15.123Z",
        "state_message": "Claude Code is working",
        "vm_name": "sandbox-abc",
        "vm_ip": None,
        "vm": {"runtime": "bubblewrap", "tier": "namespaces", "image": "host"},
        "exit_code": 0 if state == "completed" else None,
        "error": {"code": "agent_failed", "message": "Claude Code exited with 1."} if state == "failed" else None,
        "progress": {
            "output_bytes": 4711,
            "tool_calls": 4,
            "current_tool": None,
            "last_activity_at": None,
            "turns": 4,
            "input_tokens": 26911,
            "output_tokens": 590,
            "cost_usd": 0.0895,
            "egress_denied": 0,
        },
        "result": None,
        "parent": None,
        "prompt_beginning": None,
        "continues": None,
        "definition": {},
        "sandbox_kept": state == "failed_preserved",
        **changes,
    }


def _at(seq: int) -> str:
    return f"2026-01-29T10:10:{seq:02d}.123Z"
