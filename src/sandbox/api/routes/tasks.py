"""Routes of tasks: list, read, wait for, cancel and delete them, and release a task's sandbox.

Lists have filters, sorting and page cursors.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Annotated

import msgspec
from fastapi import Query, Request
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.authentication import get_caller, require_valid_credentials
from sandbox.api.errors import ManifestForbiddenError
from sandbox.api.request_parsing import (
    TIME,
    CommaSeparated,
    accepts_body,
    body_memory,
    parse_json_body,
    parse_time,
    read_body,
)
from sandbox.api.responses import JsonResponse
from sandbox.api.route_declarations import (
    component_ref,
    create_router,
    declare_parameters,
    problem_responses,
    request_body,
)
from sandbox.api.streaming_response import wait_for_disconnect
from sandbox.api.task_json import is_derived, task_body, task_item_body
from sandbox.interfaces.server_services import TaskQueries
from sandbox.interfaces.store import Cursor, Sort, SortDirection, TaskPage, TaskQuery, TaskTotals
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import DECODE_ERRORS, FieldError, InvalidParameterError
from sandbox.model.fixed_limits import (
    LABELS_MAX,
    REPOSITORY_FILTER_CHARACTERS_MAX,
    SEARCH_CHARACTERS_MAX,
    TASK_ID_CHARACTERS_MAX,
)
from sandbox.model.manifest.field_formats import NO_CONTROL_CHARACTERS, Format
from sandbox.model.manifest.yaml import manifest_data
from sandbox.model.task_names_and_ids import PROMPT_BEGINNING_BYTES
from sandbox.model.task_state import OUTCOMES, TaskState, states_matching_filter
from sandbox.model.wire.request_bodies import REASON_LENGTH_MAX, CancelRequest
from sandbox.model.wire.task_bodies import CancelledBody, DeletedBody, ReleasedBody, TaskBody, TaskListBody
from sandbox.primitives import fair_client_shares
from sandbox.primitives.concurrency import run_until_first_complete

CURSOR_LENGTH_MAX = 2048

CURSOR_PATTERN = rf"^[A-Za-z0-9_-]{{1,{CURSOR_LENGTH_MAX}}}$"
_CURSOR_VERSION = 1


class PageCursor(msgspec.Struct, frozen=True, array_like=True):
    """A cursor with the sort order of its list; it is invalid for other lists."""

    version: int
    sort: Sort
    order: SortDirection
    value: str | None
    task_id: str

    @property
    def cursor(self) -> Cursor:
        """The position in the list."""
        return Cursor(self.value, self.task_id)


def encode_cursor(cursor: Cursor | None, query: TaskQuery) -> str | None:
    """Encode a cursor for this query; return None if there is no cursor."""
    if cursor is None:
        return None
    page_cursor = PageCursor(_CURSOR_VERSION, query.sort, query.order, cursor.value, cursor.task_id)
    return base64.urlsafe_b64encode(msgspec.json.encode(page_cursor)).rstrip(b"=").decode()


def _check_cursor(text: str) -> str | None:
    try:
        is_valid = re.fullmatch(CURSOR_PATTERN.strip("^$"), text) is not None and _is_consistent(decode_cursor(text))
    except (binascii.Error, ValueError, *DECODE_ERRORS):
        is_valid = False
    return None if is_valid else "must be the next_cursor of an earlier response; omit it to start at the beginning"


def _is_consistent(cursor: PageCursor) -> bool:
    return cursor.version == _CURSOR_VERSION and (cursor.value is not None or cursor.sort == "started_at")


CURSOR = Format("cursor", _check_cursor, {"maxLength": CURSOR_LENGTH_MAX, "pattern": CURSOR_PATTERN})
"""A cursor that `encode_cursor` returned."""


def decode_cursor(text: str) -> PageCursor:
    """Decode text that has the format `CURSOR`."""
    return msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=PageCursor)


LIMIT_MAX = 1000
OFFSET_MAX = 2**53

_LABEL_PREFIX = "label."
_LABEL_PARAMETER = {
    "name": "labels",
    "in": "query",
    "required": False,
    "description": "Only tasks with this label: `label.KEY=VALUE`. If repeated, only tasks that have all of the "
    f"labels, at most {LABELS_MAX}. "
    'In generated clients, this is the parameter `labels`, an object: `{"label.KEY": "VALUE"}`',
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "patternProperties": {"^label\\.": {"type": "string"}}, "additionalProperties": False},
}
_STATES = CommaSeparated(tuple(TaskState))
_OUTCOMES = CommaSeparated(tuple(OUTCOMES))


class ListQuery(BaseModel):
    """Query parameters of the task list."""

    state: Annotated[str, _STATES] = Field(
        "",
        description=(
            "States, separated by commas. `failed` includes `failed_preserved`; `failed_preserved` selects only the "
            "failed tasks whose sandbox was preserved"
        ),
    )
    outcome: Annotated[str, _OUTCOMES] = Field(
        "",
        description=(
            "Outcomes, separated by commas: `active` for tasks that have not ended, `succeeded` for `completed`, "
            "`failed` for `failed` and `failed_preserved`, and `cancelled`. Cannot be combined with state"
        ),
    )
    q: str = Field(
        "",
        max_length=SEARCH_CHARACTERS_MAX,
        description=(
            "Words that must all occur in the name, id, prompt or repository of a task. A search word matches any "
            "word that begins with it, regardless of case. Other characters, such as quotes, only separate words"
        ),
    )
    repository: str = Field(
        "",
        max_length=REPOSITORY_FILTER_CHARACTERS_MAX,
        description="Only tasks of this repository, given as its URL, `HOST/OWNER/NAME`, `OWNER/NAME` or `NAME`",
    )
    parent: str = Field(
        "", max_length=TASK_ID_CHARACTERS_MAX, description="Only tasks that continue the task with this id"
    )
    rerun_of: str = Field("", max_length=TASK_ID_CHARACTERS_MAX, description="Only reruns of the task with this id")
    created_after: Annotated[str, TIME] = Field(
        "", description="Only tasks submitted at this time (RFC 3339, or a date for midnight UTC) or later"
    )
    created_before: Annotated[str, TIME] = Field(
        "", description="Only tasks submitted before this time (RFC 3339, or a date for midnight UTC)"
    )
    sort: Sort = Field("created_at", description="Field to sort by; `cost` is `progress.cost_usd`")
    order: SortDirection = Field("desc", description="Ascending or descending")
    limit: int = Field(100, ge=1, le=LIMIT_MAX, description="Maximum number of tasks")
    offset: int = Field(0, ge=0, le=OFFSET_MAX, description="Number of tasks to skip")
    cursor: Annotated[str, CURSOR] | None = Field(
        None,
        description=(
            "`next_cursor` of the previous page, for paging that neither skips nor repeats tasks; it includes "
            "sort and order, and cannot be combined with offset"
        ),
    )
    totals: bool = Field(
        default=False, description="Also return the number and the cost of the tasks on all pages; takes longer"
    )


router = create_router("Tasks")


@router.get(
    paths.TASKS, responses=problem_responses("service_unavailable"), openapi_extra=declare_parameters(_LABEL_PARAMETER)
)
async def list_tasks(
    request: Request, context: ContextDep, query: Annotated[ListQuery, Query()]
) -> JsonResponse[TaskListBody]:
    """List tasks. `label.KEY=VALUE` selects tasks by label; if it is repeated, a task must have all of the labels."""
    task_query = parse_query(query, request.query_params)
    async with fair_client_shares.thread_slot():
        page = await query_page(context.services.tasks, task_query, request.query_params)
        preserved = await context.services.sandboxes.preserved_sandboxes(page.tasks)
        derived = [task.id for task in page.tasks if is_derived(task)]
        prompts = await context.services.tasks.prompt_beginnings(derived, PROMPT_BEGINNING_BYTES)
        return await fair_client_shares.to_thread(
            _list_response, page, task_query, preserved, prompts, is_operator=get_caller(request).is_operator
        )


def _list_response(
    page: TaskPage,
    task_query: TaskQuery,
    preserved: Container[str],
    prompts: Mapping[str, str],
    *,
    is_operator: bool,
) -> JsonResponse[TaskListBody]:
    """Return a page of the list.

    preserved: the ids of the tasks with a preserved sandbox. prompts: the beginnings of prompts, keyed by task id.
    """
    body: TaskListBody = {
        "tasks": [
            task_item_body(task, prompts.get(task.id, ""), is_operator=is_operator, is_preserved=task.id in preserved)
            for task in page.tasks
        ],
        "total_count": page.total_count,
        "limit": task_query.limit,
        "offset": task_query.offset,
        "has_more": page.next_cursor is not None,
        "next_cursor": encode_cursor(page.next_cursor, task_query),
        "totals": None if page.totals is None else {"tasks": page.totals.tasks, "cost_usd": page.totals.cost_usd},
    }
    return JsonResponse(body)


def parse_query(list_query: ListQuery, params: QueryParams) -> TaskQuery:
    """Build the query from the parameters. Raises InvalidParameterError."""
    states = states_matching_filter(map(TaskState, _STATES.parse(list_query.state)))
    outcomes = _OUTCOMES.parse(list_query.outcome)
    errors = []
    if states and outcomes:
        errors.append(FieldError.at(("outcome",), "format", "cannot be combined with state", part="query"))
    if sum(name.startswith(_LABEL_PREFIX) for name, _ in params.multi_items()) > LABELS_MAX:
        message = f"must occur at most {LABELS_MAX} times, because a task has at most {LABELS_MAX} labels"
        errors.append(FieldError.at((f"{_LABEL_PREFIX}KEY",), "range", message, part="query"))
    if errors:
        raise InvalidParameterError(errors)
    query = TaskQuery(
        states.union(*(OUTCOMES[outcome] for outcome in outcomes)),
        _parse_labels(params) or {},
        list_query.sort,
        list_query.order,
        list_query.limit,
        list_query.offset,
        search=list_query.q,
        repository=list_query.repository,
        parent=list_query.parent,
        rerun_of=list_query.rerun_of,
        created_after=parse_time(list_query.created_after),
        created_before=parse_time(list_query.created_before),
        with_totals=list_query.totals,
    )
    return query if list_query.cursor is None else _apply_cursor(query, list_query.cursor, params)


async def query_page(tasks: TaskQueries, query: TaskQuery, params: QueryParams) -> TaskPage:
    """Return the requested page. The page is empty if the query requires two values for one label."""
    if _parse_labels(params) is not None:
        return await tasks.query(query)
    return TaskPage((), 0, totals=TaskTotals() if query.with_totals else None)


def _apply_cursor(query: TaskQuery, text: str, params: QueryParams) -> TaskQuery:
    """Return the query that continues after the cursor, with the cursor's sort order."""
    page_cursor = decode_cursor(text)
    messages = {"offset": "cannot be combined with cursor"} if query.offset else {}
    for name, value in (("sort", page_cursor.sort), ("order", page_cursor.order)):
        if params.get(name, value) != value:
            messages[name] = f"must be {value}, as in the cursor, or omitted"
    if messages:
        errors = [FieldError.at((name,), "format", message, part="query") for name, message in messages.items()]
        raise InvalidParameterError(errors)
    return replace(query, sort=page_cursor.sort, order=page_cursor.order, cursor=page_cursor.cursor)


def _parse_labels(params: QueryParams) -> dict[str, str] | None:
    """Return the requested labels, or None if one key is requested with two values, which no task can match."""
    labels: dict[str, str] = {}
    for name, value in params.multi_items():
        if name.startswith(_LABEL_PREFIX) and labels.setdefault(name.removeprefix(_LABEL_PREFIX), value) != value:
            return None
    return labels


WAIT_SECONDS_MAX = 600

_Reason = Annotated[
    str,
    NO_CONTROL_CHARACTERS,
    Query(max_length=REASON_LENGTH_MAX, description="Why the task is cancelled; stored with the task; one line"),
]
_Force = Annotated[bool, Query(description="Do not wait for the agent to exit on its own")]
_CANCEL_BODY = request_body(
    "The query parameters may be given here instead.",
    required=False,
    application_json=component_ref("CancelRequest"),
)

task_router = create_router("Tasks")


@task_router.get(paths.TASK, responses=problem_responses("task_not_found", "service_unavailable"))
async def get_task(request: Request, context: ContextDep, task_id: paths.TaskId) -> JsonResponse[TaskBody]:
    """Get the status of a task."""
    return await _current_task_response(request, context, task_id)


@task_router.get(
    paths.MANIFEST,
    responses={
        200: {"description": "The manifest", "content": {"application/json": {"schema": component_ref("Manifest")}}},
        **problem_responses("task_not_found", "service_unavailable"),
    },
    response_class=Response,
)
async def get_manifest(request: Request, context: ContextDep, task_id: paths.TaskId) -> Response:
    """Get the manifest of a task.

    It can be submitted again: it has no id and no fields with default values. It contains the sources of secrets, but
    not their values, so reading it requires the operator role. `definition` in the status contains only the names of
    secrets.
    """
    if not get_caller(request).is_operator:
        raise ManifestForbiddenError
    async with fair_client_shares.thread_slot():
        task = await context.services.tasks.status(task_id)
        return await fair_client_shares.to_thread(
            lambda: JsonResponse(manifest_data(task.manifest, context.settings.agents))
        )


async def _current_task_response(request: Request, context: AppContext, task_id: str) -> JsonResponse[TaskBody]:
    """Load the task and its chain with one thread slot: a task may use megabytes while it waits for another slot."""
    services, is_operator = context.services, get_caller(request).is_operator
    async with fair_client_shares.thread_slot():
        task = await services.tasks.status(task_id)
        return JsonResponse(await task_body(services.tasks, services.sandboxes, task, is_operator=is_operator))


@task_router.get(paths.WAIT, responses=problem_responses("task_not_found", "service_unavailable"))
async def wait_for_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    timeout: Annotated[float, Query(ge=0, le=WAIT_SECONDS_MAX, description="Maximum time to wait, in seconds")] = 60,  # noqa: ASYNC109
) -> JsonResponse[TaskBody]:
    """Wait until a task has ended or the timeout has expired; return the task's status."""
    tasks = context.services.tasks
    # A disconnect or a shutdown ends the wait early.
    await run_until_first_complete(
        tasks.wait(task_id, timeout), context.shutting_down.wait(), wait_for_disconnect(request.receive)
    )
    return await _current_task_response(request, context, task_id)


@task_router.delete(
    paths.TASK,
    responses=problem_responses(
        "task_not_found", "request_timeout", "task_already_terminal", "payload_too_large", "service_unavailable"
    ),
    openapi_extra=_CANCEL_BODY,
)
@accepts_body(lambda content, request: parse_json_body(content, request, CancelRequest))
async def cancel_task(
    request: Request, context: ContextDep, task_id: paths.TaskId, reason: _Reason = "", *, force: _Force = False
) -> JsonResponse[CancelledBody]:
    """Cancel a task. The request can be repeated with `force`, which skips the grace period."""
    async with body_memory(request):
        content = await read_body(request)
        defaults = {"reason": reason, "force": force}
        cancel_request = await fair_client_shares.to_thread(parse_json_body, content, request, CancelRequest, defaults)
    require_valid_credentials(request, context.admission)
    cancellation = await context.services.cancellation.cancel(
        task_id, reason=cancel_request.reason, force=cancel_request.force
    )
    body: CancelledBody = {
        "success": True,
        "id": cancellation.task_before.id,
        "task_id": cancellation.task_before.id,
        "previous_state": cancellation.task_before.state.value,
        "new_state": "cancelled",
        "message": cancellation.message,
        "state": cancellation.state.value,
        "requested_at": format_timestamp(cancellation.requested_at),
        "cancelled_at": format_timestamp(cancellation.requested_at),
    }
    return JsonResponse(body)


@task_router.delete(paths.VM, responses=problem_responses("task_not_found", "sandbox_not_found", "service_unavailable"))
async def release_sandbox(context: ContextDep, task_id: paths.TaskId) -> JsonResponse[ReleasedBody]:
    """Remove the preserved sandbox of a task and free its disk space."""
    await context.services.sandboxes.release(task_id)
    message = f"The preserved sandbox of task {task_id} is released."
    body: ReleasedBody = {"success": True, "id": task_id, "task_id": task_id, "message": message}
    return JsonResponse(body)


@task_router.delete(paths.DATA, responses=problem_responses("task_not_found", "task_not_ended", "service_unavailable"))
async def delete_task(context: ContextDep, task_id: paths.TaskId) -> JsonResponse[DeletedBody]:
    """Delete a task that has ended, with all its data: journal, artifacts and any preserved sandbox."""
    message = await context.services.deletion.delete(task_id)
    body: DeletedBody = {"success": True, "id": task_id, "task_id": task_id, "message": message}
    return JsonResponse(body)
