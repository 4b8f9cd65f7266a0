"""The task list page: pending tasks with reasons, and the list, whose filters are in the query string."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import accepts_html
from sandbox.api.request_parameters import encode_cursor, reject_repeated_params
from sandbox.api.responses import JsonResponse
from sandbox.api.routes.task_list import ListQuery, parse_query, query_page
from sandbox.dashboard.templates import render_page
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import TaskQueries
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.system import client_fairness

_PAGE_ROWS = 50
_PENDING_ROWS = 20

_ACTIVE_STATES = tuple(state for state in TaskState if state not in FINAL_STATES and state is not TaskState.PENDING)
_STATE_FILTERS: Mapping[str, Sequence[TaskState]] = {
    "All": (),
    "Waiting": (TaskState.PENDING,),
    "Active": _ACTIVE_STATES,
    "Completed": (TaskState.COMPLETED,),
    "Failed": (TaskState.FAILED, TaskState.FAILED_PRESERVED),
    "Cancelled": (TaskState.CANCELLED,),
}
_SORT_LABELS = {
    "created_at": "Newest first",
    "state_changed_at": "Last changed first",
    "started_at": "Last started first",
    "name": "By name",
}


@dataclass(frozen=True, slots=True)
class FilterOption:
    """A filter or sort option. query: the query string that selects it; count: None if not counted."""

    name: str
    query: str
    is_selected: bool
    count: int | None = None


async def show_tasks(request: Request, context: AppContext) -> Response:
    """Render the list for browsers; send other clients links to the API."""
    if not accepts_html(request):
        return _api_links(context)
    if (label := request.query_params.get("label")) is not None:
        return RedirectResponse(f"/?{_with_label(request, label)}", 303)
    query = parse_query(_parse_list_query(request), request.query_params)
    async with client_fairness.thread_slot():
        return await _render_tasks(request, context, query)


async def _render_tasks(request: Request, context: AppContext, query: TaskQuery) -> Response:
    page = await query_page(context.services.tasks, query, request.query_params)
    health = await context.services.administration.health()
    waiting = await _pending_tasks(context.services.tasks)
    return await client_fairness.to_thread(
        render_page,
        request,
        "tasks",
        tasks=page.tasks,
        total_count=page.total_count,
        older=_query_with(request, cursor=encode_cursor(page.next_cursor, query)) if page.next_cursor else None,
        is_first_page=query.cursor is None,
        waiting=waiting if query.cursor is None and not query.states and not query.labels else [],
        waiting_count=health.tasks_by_state.get(TaskState.PENDING, 0),
        reasons=health.reasons,
        groups=_state_filters(request, query, health.tasks_by_state),
        labels=[
            FilterOption(f"{key}={value}", _without_label(request, key), True) for key, value in query.labels.items()
        ],
        label_query=partial(_label_query, request),
        sorts=_sort_options(request, query),
        kept=[(name, value) for name, value in request.query_params.multi_items() if name != "cursor"],
        first_page=_query_with(request),
        here=f"/?{request.query_params}" if request.query_params else "/",
    )


def _api_links(context: AppContext) -> Response:
    links = {
        "tasks": paths.TASKS,
        "health": paths.HEALTH,
        "metrics": paths.METRICS,
        "schema": paths.SCHEMA,
        "docs": paths.DOCS,
    }
    return JsonResponse({"name": "Sandbox", "version": context.settings.version, "links": links})


def _parse_list_query(request: Request) -> ListQuery:
    reject_repeated_params(request.query_params, ListQuery.model_fields)
    params = {name: value for name, value in request.query_params.items() if name in ListQuery.model_fields}
    try:
        return ListQuery.model_validate({"limit": _PAGE_ROWS, **params, "order": _default_order(params)})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidParameterError(str(first["loc"][0]), first["msg"]) from None


def _default_order(params: Mapping[str, str]) -> str:
    return params.get("order") or ("asc" if params.get("sort") == "name" else "desc")


async def _pending_tasks(tasks: TaskQueries) -> Sequence[Task]:
    """Return the first pending tasks of the queue."""
    query = TaskQuery(frozenset({TaskState.PENDING}), order="asc", limit=_PENDING_ROWS)
    return (await tasks.query(query)).tasks


def _state_filters(request: Request, query: TaskQuery, counts: Mapping[TaskState, int]) -> list[FilterOption]:
    return [
        FilterOption(
            name,
            _query_with(request, state=",".join(states) or None),
            query.states == frozenset(states),
            sum(counts.get(state, 0) for state in states or TaskState),
        )
        for name, states in _STATE_FILTERS.items()
    ]


def _sort_options(request: Request, query: TaskQuery) -> list[FilterOption]:
    return [
        FilterOption(
            name, _query_with(request, sort=None if sort == "created_at" else sort, order=None), query.sort == sort
        )
        for sort, name in _SORT_LABELS.items()
    ]


def _query_with(request: Request, **changes: str | None) -> str:
    """Return the query string with these parameters replaced, for the first page."""
    params = request.query_params.multi_items()
    current = [(name, value) for name, value in params if name not in {*changes, "cursor", "offset", "label"}]
    pairs = [*current, *((name, value) for name, value in changes.items() if value is not None)]
    # A label's value may be empty; other empty parameters have no meaning.
    return urlencode([(name, value) for name, value in pairs if value or name.startswith("label.")])


def _with_label(request: Request, label: str) -> str:
    """Convert the form's `key=value` to the API's label parameter."""
    key, equals, value = label.partition("=")
    return _query_with(request, **({f"label.{key.strip()}": value.strip()} if key.strip() and equals else {}))


def _without_label(request: Request, key: str) -> str:
    return _query_with(request, **{f"label.{key}": None})


def _label_query(request: Request, key: str, value: str) -> str:
    """Return the query string with this label added."""
    return _query_with(request, **{f"label.{key}": value})
