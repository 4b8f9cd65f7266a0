"""The task list page: active, pending and finished tasks, with filters in the query string."""

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import urlencode
from zlib import crc32

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import get_caller
from sandbox.api.request_parsing import accepts_html, check_format, parse_query_params
from sandbox.api.responses import JsonResponse
from sandbox.api.routes.tasks import OFFSET_MAX, ListQuery, encode_cursor, parse_query, query_page
from sandbox.dashboard.failure_notice import FailureNotice, describe_failure
from sandbox.dashboard.templates import render_page, short_id
from sandbox.interfaces.server_services import Health, TaskQueries
from sandbox.interfaces.store import Sort, TaskPage, TaskQuery
from sandbox.model.fixed_limits import SEARCH_CHARACTERS_MAX, SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.model.repository_urls import short_repository
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import PROMPT_BEGINNING_BYTES, prompt_hint, shorten_line
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.model.wire.task_conversion import task_failure_body
from sandbox.primitives import fair_client_shares

_PAGE_ROWS = 50
_ACTIVE_ROWS = 50
_PENDING_ROWS = 20

_WORDS_BEFORE_LENGTH_MAX = 15
"""Maximum length of the text before a searched word, so that the word is visible in a narrow row."""

_SEARCHED_WORDS_MAX = 10
"""Maximum number of distinct search words that are looked for in the prompts."""

_HEADLINE_LENGTH_MAX = 300
_BLOCK_MARKS = re.compile(r"^(?:#{1,6}|>|[-*+]|\d+\.)\s+")
_STRONG = re.compile(r"\*\*([^*]+)\*\*")

_ACTIVE_STATES = tuple(state for state in TaskState if state not in FINAL_STATES and state is not TaskState.PENDING)
_STATE_FILTERS: Mapping[str, Sequence[TaskState]] = {
    "All": (),
    "Waiting": (TaskState.PENDING,),
    "Running": _ACTIVE_STATES,
    "Completed": (TaskState.COMPLETED,),
    "Failed": (TaskState.FAILED, TaskState.FAILED_PRESERVED),
    "Cancelled": (TaskState.CANCELLED,),
}
_SORT_LABELS = {
    "state_changed_at": "Last changed first",
    "created_at": "Newest first",
    "started_at": "Last started first",
    "cost": "Most expensive first",
    "name": "By name",
}
_DEFAULT_SORT = "state_changed_at"
"""With this order, the most recently finished task comes first in the list of finished tasks."""
_TIME_LABELS = {"state_changed_at": "Changed", "started_at": "Started", "created_at": "Submitted"}
"""Headings of the time column, keyed by field. If the list is sorted by a time, the column shows this time."""

_PERIODS = {"1h": "Last hour", "24h": "Last 24 hours", "7d": "Last 7 days", "30d": "Last 30 days"}
_PERIOD = pattern_format("period", "[1-9][0-9]{0,3}[hd]", "must be a period such as 24h or 7d")
_TOTAL_COST_ID = "total-cost-"
_COUNTS_ID = "counts-"
_FORM_PARAMS = frozenset({"label"})
"""Parameters of the page's forms. A redirect converts them to parameters of the API."""
_PAGE_PARAMS = frozenset({"cursor", "offset"})
_KNOWN_PARAMS = {*ListQuery.model_fields, "since"} - _PAGE_PARAMS
_LABEL_PREFIX = "label."

_ROW_LINK_PARAMS_LENGTH_MAX = 500
"""Maximum length of the parameters that the links in a row keep. A page can have 1000 rows with 65 links each."""


@dataclass(frozen=True, slots=True)
class FilterOption:
    """A filter or sort option. query: the query string that selects it; count: None if not counted."""

    name: str
    query: str
    is_selected: bool
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Tasks under a heading. count: the total number of such tasks; query: the query string that lists all of them."""

    name: str
    tasks: Sequence[Task]
    count: int
    query: str


class Hint(NamedTuple):
    """Texts next to a task's name.

    text: distinguishes the task from others with the same name, or is the beginning of the prompt; may be empty.
    match: the part of the prompt with a searched word; empty if there is none.
    """

    text: str
    match: str = ""


async def show_tasks(request: Request, context: AppContext) -> Response:
    """Render the list for browsers; send other clients links to the API."""
    if not accepts_html(request):
        return _api_links(context)
    if _FORM_PARAMS & request.query_params.keys():
        return RedirectResponse(f"/?{_convert_form(request)}", 303)
    query = parse_query(_parse_list_query(request), request.query_params)
    if since := request.query_params.get("since", ""):
        query = replace(query, created_after=datetime.now(UTC) - _parse_period(since))
    async with fair_client_shares.thread_slot():
        return await _render_tasks(request, context, query)


async def _render_tasks(request: Request, context: AppContext, query: TaskQuery) -> Response:
    tasks = context.services.tasks
    is_first_page = query.cursor is None and query.offset == 0
    # Without a state filter, active and pending tasks come first, followed by the list of finished tasks.
    is_divided = not query.states
    if is_first_page and _filters(request, query) and not _is_refresh_of(request, "tasks", _COUNTS_ID):
        query = replace(query, with_totals=True)
    # Query the page last, so that a task that ends in between is found twice rather than missed.
    unfinished = await _query_unfinished(request, tasks, query) if is_divided and is_first_page else None
    page = await query_page(tasks, query, request.query_params)
    sections = _unfinished_sections(request, unfinished, page) if unfinished else []
    health = await context.services.administration.health()
    counts = await _count_by_state_filter(request, tasks, query, health)
    shown = [*page.tasks, *(task for section in sections for task in section.tasks)]
    sharing = tasks_sharing_a_name(shown)
    hinted = shown if query.search else sharing
    length = SEARCHED_PROMPT_CHARACTERS_MAX if query.search else PROMPT_BEGINNING_BYTES
    prompts = await tasks.prompt_beginnings([task.id for task in hinted], length)
    values = {
        **await fair_client_shares.to_thread(_page_values, request, query, page, counts),
        "tasks": [task for task in page.tasks if task.state.is_final] if is_divided else page.tasks,
        "preserved": await context.services.sandboxes.preserved_sandboxes(page.tasks),
        "sections": sections,
        "is_divided": is_divided,
        "is_continued": query.cursor is not None,
        "reasons": health.reasons,
        "sharing": {task.id for task in sharing},
        "hints": await fair_client_shares.to_thread(distinguishing_hints, hinted, prompts, query.search),
        "final_message_headline": final_message_headline,
        "failure": partial(_failure_notice, is_operator=get_caller(request).is_operator),
        "now": datetime.now(UTC),
        "time_label": _TIME_LABELS[_time_field(query)],
        "shown_time": attrgetter(_time_field(query)),
    }
    return await fair_client_shares.to_thread(partial(render_page, request, "tasks", **values))


def _is_refresh_of(request: Request, *parts: str) -> bool:
    """Return whether this request refreshes only one page element, whose id begins with one of `parts`.

    The page refreshes the list (`tasks`) every two seconds, and the counts and the cost less often.
    """
    return request.headers.get("HX-Target", "").startswith(parts)


def final_message_headline(task: Task) -> str:
    """Return the first line of the agent's final message that has words, without Markdown marks; empty if no line does.

    Backticks are kept.
    """
    lines = (line.strip() for line in (task.final_message_or_result or "").split("\n"))
    line = next((line for line in lines if any(character.isalnum() for character in line)), "")
    return _STRONG.sub(r"\1", _BLOCK_MARKS.sub("", line[:_HEADLINE_LENGTH_MAX]))


def _failure_notice(task: Task, *, is_operator: bool) -> FailureNotice | None:
    error = task_failure_body(task, is_operator=is_operator)
    return describe_failure(error) if error else None


async def _query_unfinished(request: Request, tasks: TaskQueries, query: TaskQuery) -> tuple[TaskPage, TaskPage]:
    """Return the active and the pending tasks. A task that starts between the two queries is in both pages."""
    common = replace(query, with_totals=False, sort="created_at", order="desc", limit=_ACTIVE_ROWS)
    pending_query = replace(common, states=frozenset({TaskState.PENDING}), order="asc", limit=_PENDING_ROWS)
    pending = await query_page(tasks, pending_query, request.query_params)
    active_query = replace(common, states=frozenset(_ACTIVE_STATES), sort=_time_field(query))
    active = await query_page(tasks, active_query, request.query_params)
    return active, pending


def _time_field(query: TaskQuery) -> Sort:
    """Return the time by which the list is sorted; if it is not sorted by time, return the submission time."""
    return query.sort if query.sort in _TIME_LABELS else "created_at"


def _unfinished_sections(request: Request, unfinished: tuple[TaskPage, TaskPage], page: TaskPage) -> list[Section]:
    """Return the sections, without the tasks that a later query found in a later state."""
    active, pending = unfinished
    finished = {task.id for task in page.tasks if task.state.is_final}
    started = {task.id for task in active.tasks} | finished
    sections = (
        _make_section(request, "Running", active, finished, _ACTIVE_STATES),
        _make_section(request, "Waiting for capacity", pending, started, (TaskState.PENDING,)),
    )
    return [section for section in sections if section.tasks]


def _make_section(
    request: Request, name: str, page: TaskPage, excluded: Container[str], states: Sequence[TaskState]
) -> Section:
    tasks = [task for task in page.tasks if task.id not in excluded]
    count = page.total_count - (len(page.tasks) - len(tasks))
    return Section(name, tasks, count, _query_with(request, state=",".join(states)))


def tasks_sharing_a_name(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks that share their name with another one.

    A task that continues or reruns another one also counts, even if that other task is not in `tasks`.
    """
    unique = {task.id: task for task in tasks}.values()
    names = Counter(task.manifest.metadata.name for task in unique)
    return [task for task in unique if task.parent or task.rerun_of or names[task.manifest.metadata.name] > 1]


def distinguishing_hints(tasks: Sequence[Task], prompts: Mapping[str, str], search: str = "") -> dict[str, Hint]:
    """Return texts, keyed by task id, that distinguish tasks with the same name and the same relations.

    prompts: the beginnings of the tasks' prompts, keyed by task id.
    search: the search query. A match shows the first searched word that the prompt contains and the name does not.
    """
    searched = _searched_words(search)
    matches = {task.id: _find_match(prompts.get(task.id, ""), task.manifest.metadata.name, searched) for task in tasks}
    words = {
        task.id: matches[task.id] or prompt_hint(prompts.get(task.id, ""), task.manifest.metadata.name)
        for task in tasks
    }
    names = Counter(task.manifest.metadata.name for task in tasks)
    keys = {
        task.id: (task.manifest.metadata.name, bool(task.rerun_of), bool(task.parent), words[task.id]) for task in tasks
    }
    counts = Counter(keys.values())
    hints = {}
    for task_id, key in keys.items():
        is_ambiguous = counts[key] > 1 or (not words[task_id] and names[key[0]] > 1)
        # The id comes first, because a narrow window truncates the end of the hint.
        parts = [f"id {short_id(task_id)}" if is_ambiguous else "", "" if matches[task_id] else words[task_id]]
        hint = Hint(" · ".join(filter(None, parts)), matches[task_id])
        if any(hint):
            hints[task_id] = hint
    return hints


def _searched_words(search: str) -> Mapping[str, re.Pattern[str]]:
    """Map each searched word, in lower case, to a pattern that matches words beginning with it."""
    words = dict.fromkeys(re.findall(r"[^\W_]+", search.lower()))
    return {word: re.compile(rf"\b{re.escape(word)}", re.IGNORECASE) for word in islice(words, _SEARCHED_WORDS_MAX)}


def _find_match(prompt: str, name: str, searched: Mapping[str, re.Pattern[str]]) -> str:
    """Return the part of the prompt with a searched word that the name lacks; empty if there is none."""
    lower = prompt.lower()
    patterns = [pattern for word, pattern in searched.items() if word in lower and not pattern.search(name)]
    found = next(filter(None, (pattern.search(prompt) for pattern in patterns)), None)
    if found is None:
        return ""
    line_start = prompt.rfind("\n", 0, found.start()) + 1
    start = line_start
    if found.start() - line_start > _WORDS_BEFORE_LENGTH_MAX:
        start = prompt.find(" ", found.start() - _WORDS_BEFORE_LENGTH_MAX, found.start()) + 1 or found.start()
    line = shorten_line(prompt[start:].split("\n", 1)[0])
    return f"…{line}" if start > line_start else line


async def _count_by_state_filter(
    request: Request, tasks: TaskQueries, query: TaskQuery, health: Health
) -> Mapping[str, int]:
    """Return how many tasks each state filter selects, with all other filters applied.

    Empty if the query continues an earlier page. Also empty if counting requires queries, and the request refreshes
    another part of the page.
    """
    is_filtered = _is_filtered(request, query)
    if query.cursor is not None or (is_filtered and _is_refresh_of(request, "tasks", _TOTAL_COST_ID)):
        return {}
    counts: dict[str, int] = {}
    for name, states in _STATE_FILTERS.items():
        if not states:
            continue
        if not is_filtered:
            counts[name] = sum(health.tasks_by_state.get(state, 0) for state in states)
            continue
        counted = replace(query, states=frozenset(states), limit=1, offset=0, with_totals=False)
        counts[name] = (await query_page(tasks, counted, request.query_params)).total_count
    return {"All": sum(counts.values()), **counts}


def _is_filtered(request: Request, query: TaskQuery) -> bool:
    """Return whether the list has a filter other than the state filter."""
    return any(name != "state" for name, _ in _filters(request, query))


def _page_values(request: Request, query: TaskQuery, page: TaskPage, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the values that the template shows in addition to the tasks. counts: see _count_by_state_filter."""
    filters = _filters(request, query)
    since = request.query_params.get("since")
    row_params, digest = _row_link_params(request), f"{crc32(_query_with(request).encode()):x}"
    next_offset, previous_offset = query.offset + query.limit, max(query.offset - query.limit, 0)
    return {
        "total_count": page.total_count,
        "total_cost": page.totals.cost_usd if page.totals else 0,
        # The page keeps these elements until the filters change: their ids contain a digest of the filters.
        # The ids must be valid CSS identifiers.
        "total_cost_id": f"{_TOTAL_COST_ID}{digest}",
        "counts_id": f"{_COUNTS_ID}{digest}",
        "are_counts_kept": _is_filtered(request, query),
        "next_rows": _query_with(request, cursor=encode_cursor(page.next_cursor, query)) if page.next_cursor else None,
        "next_page": _query_with(request, offset=str(next_offset))
        if page.next_cursor and query.cursor is None and next_offset <= OFFSET_MAX
        else None,
        "previous_page": _query_with(request, offset=str(previous_offset) if previous_offset else None)
        if query.offset
        else None,
        "groups": _state_filters(request, query, counts),
        "filters": [FilterOption(text, _query_with(request, **{name: None}), True) for name, text in filters],
        "periods": [
            FilterOption(name, _query_with(request, since=value, created_after=None), since == value)
            for value, name in _PERIODS.items()
        ],
        "label_query": partial(_label_query, row_params),
        "repository_query": partial(_repository_query, row_params),
        "sorts": _sort_options(request, query),
        "search": query.search,
        "search_length_max": SEARCH_CHARACTERS_MAX,
        "kept": _kept_params(request),
        "here": f"/?{request.query_params}" if request.query_params else "/",
    }


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
    params = request.query_params
    defaults = {"limit": str(_PAGE_ROWS), "sort": _DEFAULT_SORT, "order": _default_order(params)}
    return parse_query_params(params, ListQuery, defaults=defaults, ignores_unknown=True)


def _default_order(params: Mapping[str, str]) -> str:
    return params.get("order") or ("asc" if params.get("sort") == "name" else "desc")


def _filters(request: Request, query: TaskQuery) -> list[tuple[str, str]]:
    """Return the parameters that filter the list, each with the text to show."""
    labels = [(f"label.{key}", f"{key}={value}") for key, value in query.labels.items()]
    since = request.query_params.get("since", "")
    begin = query.created_after if not since else None
    texts = {
        "q": query.search and f"“{query.search}”",
        "state": _state_filter_name(query.states),
        "repository": short_repository(query.repository),
        "parent": query.parent and f"continues {query.parent}",
        "rerun_of": query.rerun_of and f"reruns {query.rerun_of}",
        "since": since and (_PERIODS.get(since) or f"last {since}"),
        "created_after": begin and f"since {_format_minute(begin)}",
        "created_before": query.created_before and f"before {_format_minute(query.created_before)}",
    }
    return [*((name, text) for name, text in texts.items() if text), *labels]


def _state_filter_name(states: frozenset[TaskState]) -> str:
    names = (name for name, group in _STATE_FILTERS.items() if states and states == frozenset(group))
    return next(names, ", ".join(sorted(states)))


def _format_minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _state_filters(request: Request, query: TaskQuery, counts: Mapping[str, int]) -> list[FilterOption]:
    return [
        FilterOption(
            name,
            _query_with(request, state=",".join(states) or None),
            query.states == frozenset(states),
            counts.get(name),
        )
        for name, states in _STATE_FILTERS.items()
    ]


def _sort_options(request: Request, query: TaskQuery) -> list[FilterOption]:
    return [
        FilterOption(
            name, _query_with(request, sort=None if sort == _DEFAULT_SORT else sort, order=None), query.sort == sort
        )
        for sort, name in _SORT_LABELS.items()
    ]


def _query_with(request: Request, **changes: str | None) -> str:
    """Return the query string with these parameters replaced, for the first page."""
    return _encode_query(_list_params(request), changes)


def _list_params(request: Request) -> list[tuple[str, str]]:
    """Return the parameters of the list, except those that select its page. Unknown parameters are dropped."""
    params = request.query_params.multi_items()
    return [(name, value) for name, value in params if name in _KNOWN_PARAMS or name.startswith(_LABEL_PREFIX)]


def _row_link_params(request: Request) -> list[tuple[str, str]]:
    """Return the parameters that the links in a row keep; none if they are too long to be repeated in every link."""
    params = _list_params(request)
    return params if len(urlencode(params)) <= _ROW_LINK_PARAMS_LENGTH_MAX else []


def _encode_query(params: Sequence[tuple[str, str]], changes: Mapping[str, str | None]) -> str:
    replaced = {*changes, "outcome"} if "state" in changes else changes.keys()  # both filter by state
    kept = [(name, value) for name, value in params if name not in replaced]
    pairs = [*kept, *((name, value) for name, value in changes.items() if value is not None)]
    # A label's value may be empty; other empty parameters have no meaning.
    return urlencode([(name, value) for name, value in pairs if value or name.startswith(_LABEL_PREFIX)])


def _kept_params(request: Request) -> list[tuple[str, str]]:
    """Return the parameters that a form must keep, except those for which it has fields."""
    dropped = {*_PAGE_PARAMS, *_FORM_PARAMS}
    return [(name, value) for name, value in request.query_params.multi_items() if name not in dropped]


def _convert_form(request: Request) -> str:
    """Convert `label` (`key=value`) of the page's form to the API's parameter.

    A label without a value is treated as a search word.
    """
    changes: dict[str, str | None] = {}
    label = request.query_params.get("label", "")
    key, equals, value = (part.strip() for part in label.partition("="))
    if key and equals:
        changes[f"label.{key}"] = value
    elif label.strip():
        changes["q"] = f"{request.query_params.get('q', '')} {label}".strip()
    return _query_with(request, **changes)


def _parse_period(text: str) -> timedelta:
    period = check_format(text, _PERIOD, "since", "query")
    count = int(period[:-1])
    return timedelta(hours=count) if period.endswith("h") else timedelta(days=count)


def _repository_query(params: Sequence[tuple[str, str]], url: str) -> str:
    """Return the query string with this repository as a filter."""
    return _encode_query(params, {"repository": url})


def _label_query(params: Sequence[tuple[str, str]], key: str, value: str) -> str:
    """Return the query string with this label added."""
    return _encode_query(params, {f"{_LABEL_PREFIX}{key}": value})
