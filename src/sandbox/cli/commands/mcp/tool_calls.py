"""Carries out the calls of the MCP tools and returns their results, which are limited in size for the agent."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from sandbox.client import Artifact, AsyncClient
from sandbox.model.task_state import FINAL_STATES

RESPONSE_CHARACTERS_MAX = 40_000
LINES_MAX = 1_000
LINE_CHARACTERS_MAX = 2_000
WAIT_SECONDS_MAX = 300
READ_BYTES_MAX = 64 * 1024 * 1024

_STATUS_FIELDS = (
    "name",
    "state",
    "state_message",
    "created_at",
    "started_at",
    "finished_at",
    "exit_code",
    "error",
    "final_message",
    "progress",
    "parent",
    "continues",
)
LISTED_TASKS_MAX = 50
_LISTED_FIELDS = ("id", "name", "state", "created_at", "duration_seconds", "repository", "branch", "diff", "error")
_ARTIFACT_FIELDS = ("name", "path", "size_bytes", "content_type", "contains_secret")


class ToolFailedError(Exception):
    """A tool call failed; the message is an error code and a sentence."""


async def submit(client: AsyncClient, manifest: dict[str, Any] | str) -> str:
    """Submit a task."""
    response = await client.submit(manifest)
    return _json({"task_id": response["task_id"], "state": response["state"], "message": response["message"]})


async def list_tasks(
    client: AsyncClient, search: str | None, state: str | None, repository: str | None, limit: int, offset: int
) -> str:
    """List the newest tasks that match the filters; return one page of the text."""
    states = [state] if state else []
    page = await client.tasks(states=states, search=search, repository=repository, limit=limit)
    rows = [
        {field: value for field, value in task.items() if field in _LISTED_FIELDS}
        | {"cost_usd": task["progress"]["cost_usd"]}
        for task in page["tasks"]
    ]
    return _text_page(_json({"tasks": rows, "total_count": page["total_count"]}), offset)


async def continue_task(client: AsyncClient, task_id: str, prompt: str) -> str:
    """Submit a task that continues another one."""
    response = await client.continue_task(task_id, prompt)
    return _json({"task_id": response["task_id"], "state": response["state"], "message": response["message"]})


async def status(client: AsyncClient, task_id: str, wait_seconds: int) -> str:
    """Return the task's status once the task has ended or the timeout has expired."""
    task = await client.wait(task_id, timeout_seconds=wait_seconds)
    return _json({"task_id": task["id"], **{field: value for field, value in task.items() if field in _STATUS_FIELDS}})


async def logs(client: AsyncClient, task_id: str, stream: str, lines: int) -> str:
    """Return the last lines that fit within the size limit."""
    kept_lines: deque[str] = deque()
    kept_characters = omitted_count = 0
    async with aclosing(client.logs(task_id, stream=stream, tail=lines)) as log_lines:
        async for line in log_lines:
            kept_lines.append(_truncate(line.decode(errors="replace").rstrip("\n"), LINE_CHARACTERS_MAX))
            kept_characters += len(kept_lines[-1]) + 1
            # The server's limit counts events, but a single event from a terminal can have thousands of lines.
            while kept_characters > RESPONSE_CHARACTERS_MAX or len(kept_lines) > lines:
                kept_characters -= len(kept_lines.popleft()) + 1
                omitted_count += 1
    notice = [f"[{omitted_count} earlier lines omitted]"] if omitted_count else []
    return "\n".join([*notice, *kept_lines]) or "Nothing yet."


async def diff(client: AsyncClient, task_id: str, offset: int) -> str:
    """Return one page of the patch."""
    path = f".sandbox/{task_id}.patch"
    entry = await _find_artifact(client, task_id, path)
    has_ended = entry is None and (await client.status(task_id))["state"] in FINAL_STATES
    if has_ended:
        entry = await _find_artifact(client, task_id, path)  # the patch may have been stored in the meantime
    if entry is None:
        ended = "The task ended without a patch; see its status for the reason."
        message = ended if has_ended else "There is no patch yet; it is created when the agent has ended."
        raise ToolFailedError(f"artifact_not_found: {message}")
    return await _artifact_text(client, task_id, entry, offset) or "The task changed nothing."


async def _find_artifact(client: AsyncClient, task_id: str, path: str) -> Artifact | None:
    listed = (await client.artifacts(task_id))["artifacts"]
    return next((entry for entry in listed if entry["path"] == path), None)


async def artifacts(client: AsyncClient, task_id: str, name: str | None, offset: int) -> str:
    """Return the list of artifacts, or one page of an artifact."""
    listed = (await client.artifacts(task_id))["artifacts"]
    if name is None:
        rows = [{field: value for field, value in entry.items() if field in _ARTIFACT_FIELDS} for entry in listed]
        return _text_page(_json(rows), offset)
    by_name = {entry[key]: entry for key in ("path", "name") for entry in listed}
    entry = by_name.get(name)
    if entry is None:
        raise ToolFailedError("artifact_not_found: The task has no such artifact. Omit the name to list all artifacts.")
    return await _artifact_text(client, task_id, entry, offset)


async def cancel(client: AsyncClient, task_id: str, reason: str | None, *, force: bool) -> str:
    """Cancel a task."""
    return _json(await client.cancel(task_id, reason=reason, force=force))


async def _artifact_text(client: AsyncClient, task_id: str, entry: Artifact, offset: int) -> str:
    if entry["contains_secret"]:
        message = "artifact_contains_secret: The artifact contains the value of a secret and is not sent to a model."
        raise ToolFailedError(message)
    data = await client.read(task_id, entry["name"], bytes_max=READ_BYTES_MAX)
    if b"\0" in data[:8000]:
        raise ToolFailedError(f"artifact_not_text: {entry['name']} is {entry['content_type']}; a user can download it.")
    return _text_page(data.decode(errors="replace"), offset)


def _text_page(text: str, offset: int) -> str:
    if offset and offset >= len(text):
        return f"[End of file: it has {len(text)} characters.]"
    end = offset + RESPONSE_CHARACTERS_MAX
    more = f"\n[{len(text) - end} more characters: continue with offset={end}]" if len(text) > end else ""
    return text[offset:end] + more


def _truncate(text: str, characters_max: int) -> str:
    return text if len(text) <= characters_max else f"{text[:characters_max]} […]"


def _json(value: Mapping[str, Any] | list[dict[str, Any]]) -> str:
    return json.dumps(value, ensure_ascii=False)
