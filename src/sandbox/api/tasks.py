"""Submitting, asking for, waiting for and cancelling tasks."""

import asyncio
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request

from sandbox.api import paths
from sandbox.api.answer import Json
from sandbox.api.bodies import CancelledBody, SubmittedBody, TaskBody, TaskListBody
from sandbox.api.context import Asked
from sandbox.api.errors import InvalidParameterError, NotSupportedYetError
from sandbox.api.openapi import parameters, problems, request_body
from sandbox.api.request_body import CancelWish, is_json, read_body, read_cancel_wish
from sandbox.api.status import item_body, status_body
from sandbox.api.streamed import disconnected
from sandbox.contracts.store import TaskQuery
from sandbox.contracts.tasks import Tasks
from sandbox.model.frame import timestamp
from sandbox.model.manifest_parsing import parse_manifest
from sandbox.model.state import TaskState
from sandbox.model.task import Task

OFFSET_MAX = 2**53
WAIT_SECONDS_MAX = 600

_LABEL = "label."
_LABELS = {
    "name": "labels",
    "in": "query",
    "required": False,
    "description": "`label.KEY=VALUE`, as often as there are labels to ask for; a task has to have all of them",
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "patternProperties": {"^label\\.": {"type": "string"}}, "additionalProperties": False},
}
_LOCATION = {"Location": {"description": "Where the task is", "required": True, "schema": {"type": "string"}}}
_MANIFEST = request_body(
    'The manifest. JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`.',
    required=True,
    application_yaml={"type": "string"},
    application_json={"type": "object"},
)
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
        response_model=SubmittedBody,
        responses={202: {"headers": _LOCATION}, **problems(408, 409, 413, 503, 507)},
        openapi_extra=_MANIFEST,
    )(submit_task)
    app.get(paths.TASKS, response_model=TaskListBody, responses=problems(), openapi_extra=parameters(_LABELS))(
        list_tasks
    )
    app.get(paths.TASK, response_model=TaskBody, responses=problems(404))(read_task)
    app.get(paths.WAIT, response_model=TaskBody, responses=problems(404))(wait_for_task)
    app.delete(
        paths.TASK,
        response_model=CancelledBody,
        responses=problems(404, 408, 409, 413, 503),
        openapi_extra=_CANCEL_WISH,
    )(cancel_task)


async def submit_task(request: Request, asked: Asked) -> Json:
    """Submit a task. It is durable once the answer is sent."""
    if "idempotency-key" in request.headers:
        raise NotSupportedYetError("Idempotency-Key", "a metadata.id of your own keeps a task from being made twice")
    body = await read_body(request)
    manifest = await asyncio.to_thread(
        parse_manifest, body, is_json=is_json(request), clone_hosts=asked.guard.clone_hosts()
    )
    task = await asked.tasks.submit(manifest)
    here = paths.task_path(task.id)
    answer = {
        "task_id": task.id,
        "state": TaskState.PENDING,
        "message": f"Task {task.id} was accepted.",
        "created_at": timestamp(task.created_at),
        "links": {"self": here, "logs": f"{here}/logs", "artifacts": f"{here}/artifacts"},
    }
    return Json(answer, 202, {"location": here})


async def list_tasks(
    request: Request,
    asked: Asked,
    *,
    state: Annotated[str, Query(description="States, separated by commas")] = "",
    sort: Literal["created_at", "started_at", "state_changed_at", "name"] = "created_at",
    order: Literal["asc", "desc"] = "desc",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=OFFSET_MAX)] = 0,
) -> Json:
    """List tasks. `label.KEY=VALUE`, which may be repeated, keeps those that have all these labels."""
    if "cursor" in request.query_params:
        raise NotSupportedYetError("cursor", "page with limit and offset")
    labels = _labels(request)
    answer = {"tasks": [], "total_count": 0, "limit": limit, "offset": offset, "has_more": False, "next_cursor": None}
    if labels is None:
        return Json(answer)
    query = TaskQuery(states=_states(state), labels=labels, sort=sort, order=order, limit=limit, offset=offset)
    page = await asked.tasks.query(query)
    has_more = offset + len(page.tasks) < page.total_count and bool(page.tasks)
    items = [item_body(task) for task in page.tasks]
    return Json({**answer, "tasks": items, "total_count": page.total_count, "has_more": has_more})


def _labels(request: Request) -> dict[str, str] | None:
    """The labels asked for; None when no task can have them, because one key is asked to have two values."""
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(_LABEL) and labels.setdefault(name.removeprefix(_LABEL), value) != value:
            return None
    return labels


def _states(text: str) -> frozenset[TaskState]:
    names = {name.strip() for name in text.split(",")} - {""}
    unknown = names - set(TaskState)
    if unknown:
        raise InvalidParameterError("state", f"must be one of {', '.join(TaskState)}", rule="enum")
    return frozenset(TaskState(name) for name in names)


async def read_task(asked: Asked, task_id: paths.TaskId) -> Json:
    """The status of a task."""
    return Json(status_body(await asked.tasks.status(task_id)))


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
        return Json(status_body(await _answer(waiting, asked.tasks, task_id)))
    finally:
        for task in (waiting, *interruptions):
            task.cancel()
        await asyncio.gather(waiting, *interruptions, return_exceptions=True)


async def _answer(waiting: asyncio.Task[Task], tasks: Tasks, task_id: str) -> Task:
    return await waiting if waiting.done() else await tasks.status(task_id)


async def cancel_task(
    request: Request, asked: Asked, task_id: paths.TaskId, reason: str = "", *, force: bool = False
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
