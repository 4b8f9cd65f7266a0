"""Routes that list tasks, with filters, sorting and paging."""

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Annotated

from fastapi import Query, Request
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.json_responses import JsonResponse
from sandbox.api.middleware.authentication import get_caller
from sandbox.api.page_cursor import CURSOR, decode_cursor, encode_cursor
from sandbox.api.request_parsing import TIME, CommaSeparated, parse_time
from sandbox.api.route_declarations import create_router, declare_parameters, problem_responses
from sandbox.api.task_json import is_derived, task_item_body
from sandbox.interfaces.server_services import TaskQueries
from sandbox.interfaces.store import Sort, SortDirection, TaskPage, TaskQuery, TaskTotals
from sandbox.model.fixed_limits import REPOSITORY_FILTER_CHARACTERS_MAX, SEARCH_CHARACTERS_MAX, TASK_ID_CHARACTERS_MAX
from sandbox.model.input_errors import FieldError, InvalidParameterError
from sandbox.model.task_names import PROMPT_BEGINNING_BYTES
from sandbox.model.task_state import OUTCOMES, TaskState, states_matching_filter
from sandbox.model.wire.task_bodies import TaskListBody
from sandbox.primitives import fair_client_shares

LIMIT_MAX = 1000
OFFSET_MAX = 2**53

_LABEL_PREFIX = "label."
_LABEL_PARAMETER = {
    "name": "labels",
    "in": "query",
    "required": False,
    "description": "Only tasks with this label: `label.KEY=VALUE`. If repeated, only tasks that have all of the "
    'labels. In generated clients, this is the parameter `labels`, an object: `{"label.KEY": "VALUE"}`',
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
    rerun_of: str = Field(
        "", max_length=TASK_ID_CHARACTERS_MAX, description="Only tasks that run the task with this id again"
    )
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
    if states and outcomes:
        raise InvalidParameterError(
            [FieldError.at(("outcome",), "format", "cannot be combined with state", part="query")]
        )
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
