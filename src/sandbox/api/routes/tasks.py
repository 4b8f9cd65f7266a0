"""Submitting, asking for, waiting for and cancelling tasks."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from sandbox.api import paths
from sandbox.api.context import Asked, Context
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import visitor_of
from sandbox.api.openapi import MANIFEST_REF, answers, header, parameters, problems, request_body
from sandbox.api.request_parameters import REASON_LENGTH_MAX, CancelWish, is_json, read_body, read_cancel_wish
from sandbox.api.responses import Json
from sandbox.api.streaming.response import disconnected
from sandbox.api.task_body import definition_body, status_body
from sandbox.interfaces.tasks import Submission, Tasks
from sandbox.model.events import Idempotency
from sandbox.model.manifest.parser import parse_manifest
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import timestamp
from sandbox.system.log_context import TASK_ID

HEADER = "Idempotency-Key"
KEY_LENGTH_MAX = 255
KEY_PATTERN = rf"^[!-~]{{1,{KEY_LENGTH_MAX}}}$"

_IDEMPOTENCY_KEY = re.compile(KEY_PATTERN.strip("^$"), re.ASCII)


def read_idempotency(request: Request, body: bytes) -> Idempotency | None:
    """The key with the digest of the body that it came with; None without one. Raises InvalidParameterError."""
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not _IDEMPOTENCY_KEY.fullmatch(keys[0]):
        message = f"must be one key of 1 to {KEY_LENGTH_MAX} visible ASCII characters"
        raise InvalidParameterError(HEADER, message)
    return Idempotency(keys[0], hashlib.sha256(body).hexdigest())


REPLAYED = "Idempotent-Replayed"
WAIT_SECONDS_MAX = 600

_SUBMITTED = {
    "Location": {"description": "Where the task is", "required": True, "schema": {"type": "string"}},
    REPLAYED: {
        "description": "`true` when the key and the body came before; the answer is the one of then",
        "schema": {"type": "string", "enum": ["true"]},
    },
}
_TAKEN = answers("SubmittedBody", 202, headers=_SUBMITTED) | answers(
    "DryRunBody", description="The answer to `dry_run=true`: the manifest would be taken"
)
_WRAPPED = [
    {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}
    for name, schema in (("manifest", MANIFEST_REF), ("manifest_yaml", {"type": "string"}))
]
_MANIFEST = request_body(
    'The manifest. JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`.',
    required=True,
    application_yaml=MANIFEST_REF,
    application_json={"anyOf": [MANIFEST_REF, *_WRAPPED]},
)
_KEY = header(
    HEADER,
    "The same key and body give the same task again, for 24 hours; nothing is submitted twice",
    {"type": "string", "minLength": 1, "maxLength": KEY_LENGTH_MAX, "pattern": KEY_PATTERN},
)
_DryRun = Annotated[bool, Query(description="Check the manifest as a submission does, and submit nothing")]
_Reason = Annotated[str, Query(description=f"Kept with the task; {REASON_LENGTH_MAX} characters at most")]
_Force = Annotated[bool, Query(description="Give the agent no time to end by itself")]
_CANCEL_WISH = request_body(
    "What the query says may be said here instead.",
    required=False,
    application_json={
        "type": "object",
        "properties": {"reason": {"type": "string"}, "force": {"type": "boolean"}},
        "additionalProperties": False,
    },
)


def add_task_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.post(
        paths.TASKS,
        status_code=202,
        responses=_TAKEN | problems(408, 409, 413, 422, 503, 507),
        openapi_extra=_MANIFEST | parameters(_KEY),
    )(submit_task)
    app.get(paths.TASK, responses=answers("TaskBody") | problems(404, 503))(read_task)
    app.get(paths.WAIT, responses=answers("TaskBody") | problems(404, 503))(wait_for_task)
    app.delete(
        paths.TASK,
        responses=answers("CancelledBody") | problems(404, 408, 409, 413, 503),
        openapi_extra=_CANCEL_WISH,
    )(cancel_task)


async def submit_task(request: Request, asked: Asked, dry_run: _DryRun = False) -> Json:
    """Submit a task. It is durable once the answer is sent."""
    body = await read_body(request)
    idempotency = read_idempotency(request, body)
    if idempotency is not None and not dry_run and (before := await asked.tasks.find_submission(idempotency)):
        # What the server takes may have changed since; what it took has not.
        return _submitted(before)
    manifest = await asyncio.to_thread(_parse, body, request, asked)
    if dry_run:
        await asked.tasks.check(manifest)
        message = "The manifest is valid; nothing was submitted."
        return Json({"dry_run": True, "message": message, "definition": definition_body(manifest)})
    return _submitted(await asked.tasks.submit(manifest, idempotency))


def _submitted(submission: Submission) -> Json:
    task = submission.task
    TASK_ID.set(task.id)
    here = paths.task_path(task.id)
    answer = {
        "task_id": task.id,
        "state": TaskState.PENDING,
        "message": f"Task {task.id} was accepted.",
        "created_at": timestamp(task.created_at),
        "links": {"self": here, "logs": f"{here}/logs", "artifacts": f"{here}/artifacts"},
    }
    return Json(answer, 202, {"location": here} | ({REPLAYED: "true"} if submission.is_replayed else {}))


def _parse(body: bytes, request: Request, asked: Asked) -> Manifest:
    profiles = asked.settings.profiles
    return parse_manifest(
        body,
        is_json=is_json(request),
        profiles=None if profiles is None else profiles(),
        clone_hosts=asked.guard.clone_hosts(),
        priced=asked.settings.priced,
    )


async def read_task(request: Request, asked: Asked, task_id: paths.TaskId) -> Json:
    """The status of a task."""
    return Json(await _status(request, asked, await asked.tasks.status(task_id)))


async def _status(request: Request, asked: Context, task: Task) -> dict[str, Any]:
    return await status_body(asked.tasks, task, is_operator=visitor_of(request).is_operator)


async def wait_for_task(
    request: Request,
    asked: Asked,
    task_id: paths.TaskId,
    timeout: Annotated[float, Query(ge=0, le=WAIT_SECONDS_MAX, description="Seconds")] = 60,  # noqa: ASYNC109
) -> Json:
    """The status of a task once it is terminal, or as it is when the time is over."""
    waiting = asyncio.create_task(asked.tasks.wait(task_id, timeout))
    interruptions = [
        asyncio.create_task(asked.shutting_down.wait()),
        asyncio.create_task(disconnected(request.receive)),
    ]
    try:
        await asyncio.wait([waiting, *interruptions], return_when=asyncio.FIRST_COMPLETED)
        return Json(await _status(request, asked, await _answer(waiting, asked.tasks, task_id)))
    finally:
        for task in (waiting, *interruptions):
            task.cancel()
        await asyncio.gather(waiting, *interruptions, return_exceptions=True)


async def _answer(waiting: asyncio.Task[Task], tasks: Tasks, task_id: str) -> Task:
    return await waiting if waiting.done() else await tasks.status(task_id)


async def cancel_task(
    request: Request, asked: Asked, task_id: paths.TaskId, reason: _Reason = "", *, force: _Force = False
) -> Json:
    """Cancel a task. Again before the end: `force` hurries it."""
    wish = await read_cancel_wish(request, CancelWish(reason, force))
    cancellation = await asked.tasks.cancel(task_id, reason=wish.reason, force=wish.force)
    answer = {
        "success": True,
        "task_id": cancellation.task.id,
        "previous_state": cancellation.task.state,
        "new_state": TaskState.CANCELLED,
        "message": cancellation.message,
        "cancelled_at": timestamp(cancellation.at),
    }
    return Json(answer)


def add_preserved_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.delete(paths.VM, responses=answers("ReleasedBody") | problems(404, 503))(release_sandbox)


async def release_sandbox(asked: Asked, task_id: paths.TaskId) -> Json:
    """Release the preserved sandbox of a task, and the disk that it takes."""
    await asked.tasks.release(task_id)
    answer = {"success": True, "task_id": task_id, "message": f"The preserved sandbox of task {task_id} is released."}
    return Json(answer)
