"""Reads pages of tasks, and computes the terms by which the full-text index finds tasks.

A page is a part of a sorted list of tasks or search results. It omits the data that lists do not show.

A search is a conjunction of terms: the beginnings of words, labels, names of a repository, the task that is
continued or run again, and the state. The full-text index maps each term to the tasks that have it. Only the term for
the state ever changes.
"""

import dataclasses
import math
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, get_type_hints

import msgspec

from sandbox.interfaces.store import Cursor, IndexDamagedError, InvalidCursorError, TaskQuery, TaskTotals
from sandbox.model.fixed_limits import LABELS_MAX, SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.manifest.schema import AgentSection, CommonFields, Manifest, Repository
from sandbox.model.repository_urls import repository_location, repository_names
from sandbox.model.task import Task, final_message_in_result

_WORD_CHARACTERS_MAX = 16
"""Number of characters of a word that are compared."""

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
"""Chinese and Japanese are written without spaces, so each of their characters is a word."""

_LABEL_MARK, _REPOSITORY_MARK, _STATE_MARK, _PARENT_MARK, _RERUN_OF_MARK = "\ue000\ue001\ue002\ue003\ue004"
"""First characters of terms that are not words. None is a letter or a digit, so no word contains them."""


def split_words(text: str) -> set[str]:
    """Return the distinct words: runs of letters and digits, ignoring case and accents."""
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKD", text).casefold()
        text = "".join(letter for letter in text if not unicodedata.combining(letter))
    return {word[:_WORD_CHARACTERS_MAX] for word in _WORD.findall(text)}


def task_terms(task: Task) -> str:
    """Return the terms of a task, separated by spaces, without its state.

    The terms are all beginnings of each word, the labels, the names of the repository, and the task that this task
    continues or runs again.
    """
    manifest = task.manifest
    url, prompt = manifest.repository.url, manifest.agent.prompt[:SEARCHED_PROMPT_CHARACTERS_MAX]
    words = split_words("\n".join((manifest.metadata.name, task.id, repository_location(url), prompt)))
    beginnings = {word[:length] for word in words for length in range(1, len(word) + 1)}
    repositories = {_exact_term(_REPOSITORY_MARK, name) for name in repository_names(url)}
    parents = [_exact_term(_PARENT_MARK, task.parent.task_id)] if task.parent is not None else []
    originals = [_exact_term(_RERUN_OF_MARK, task.rerun_of)] if task.rerun_of is not None else []
    return " ".join((*beginnings, *repositories, *parents, *originals, *_label_terms(manifest.metadata.labels)))


def state_term(state: str) -> str:
    """Return the term of a state. The term contains no `_`, because the full-text index splits terms at `_`."""
    return _STATE_MARK + state.replace("_", "")


def content_digest(task: Task) -> bytes:
    """Return a digest of everything that determines a task's terms."""
    manifest = task.manifest
    texts = (manifest.metadata.name, manifest.metadata.labels, task.id, manifest.repository.url, manifest.agent.prompt)
    parents = (task.parent.task_id,) if task.parent is not None else ()
    originals = ({"rerun_of": task.rerun_of},) if task.rerun_of is not None else ()
    return blake2b(msgspec.json.encode((*texts, *parents, *originals)), digest_size=8).digest()


def query_terms(query: TaskQuery) -> str:
    """Return the full-text query for all terms that a task must have; empty if only its state or period is restricted.

    User input cannot contain query syntax of the full-text index, because each term is a quoted word or a digest.
    """
    words = split_words(query.search)
    terms = [word for word in words if not any(other != word and other.startswith(word) for other in words)]
    if query.repository:
        terms.append(_exact_term(_REPOSITORY_MARK, repository_location(query.repository)))
    if query.parent:
        terms.append(_exact_term(_PARENT_MARK, query.parent))
    if query.rerun_of:
        terms.append(_exact_term(_RERUN_OF_MARK, query.rerun_of))
    quoted = [f'"{term}"' for term in (*terms, *_label_terms(query.labels))]
    if quoted and query.states:
        states = " OR ".join(f'"{state_term(state)}"' for state in sorted(query.states))
        quoted.append(f"({states})")
    return " AND ".join(quoted)


def _label_terms(labels: Mapping[str, str]) -> Iterator[str]:
    return (_exact_term(_LABEL_MARK, f"{key}\0{value}") for key, value in labels.items())


def _exact_term(mark: str, text: str) -> str:
    return mark + blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


class _AgentResult(msgspec.Struct, frozen=True):
    """The only field of an agent's own report that is needed for lists.

    A completely decoded report can use megabytes.
    """

    result: Any = None


def _declare_listed_task() -> type[Any]:
    """Declare a `Task` whose fields have the types that lists need.

    msgspec decodes its manifest without a hook, because the manifest has no agent section. Fields that lists
    omit are not decoded.
    """
    types = get_type_hints(CommonFields)
    sections = [(each.name, types[each.name], _default_of(each)) for each in dataclasses.fields(CommonFields)]
    manifest = msgspec.defstruct("_ListedManifest", sections, frozen=True)
    listed_types = {"manifest": manifest, "result": msgspec.Raw, "artifacts": msgspec.Raw}
    declared = [
        (each.name, listed_types[each.name], _default_of(each, each.encode_name))
        for each in msgspec.structs.fields(Task)
        if each.name in listed_types
    ]
    methods = {"__eq__": _is_equal_task, "__ne__": lambda task, other: not _is_equal_task(task, other)}
    return msgspec.defstruct("_ListedTask", declared, bases=(Task,), namespace=methods, frozen=True)


def _is_equal_task(task: Task, other: object) -> bool:
    """Compare like `Task`, whose own comparison requires the same class."""
    return isinstance(other, Task) and msgspec.structs.astuple(task) == msgspec.structs.astuple(other)


def _default_of(field: msgspec.structs.FieldInfo | dataclasses.Field[Any], encoded_name: str | None = None) -> Any:
    defaults = {"default": field.default, "default_factory": field.default_factory}
    missing = (msgspec.NODEFAULT, dataclasses.MISSING)
    return msgspec.field(name=encoded_name, **{name: value for name, value in defaults.items() if value not in missing})


_list_decoder = msgspec.json.Decoder(_declare_listed_task())
_agent_result_decoder = msgspec.json.Decoder(_AgentResult)
EMPTY_AGENT_SECTION = AgentSection("", {"prompt": "", "model": ""})
"""Replaces the agent section of each manifest in a list, because lists omit that section."""


def decode_task_item(encoded: bytes) -> Task:
    """Decode a task for a list: without its artifacts, patch, agent section and agent report."""
    listed = _list_decoder.decode(encoded)
    manifest = Manifest.combine(listed.manifest, EMPTY_AGENT_SECTION)
    if manifest.repository.patch is not None:  # rows of earlier versions contain the patch
        manifest = manifest.replace(repository=without_patch(manifest.repository))
    # Nothing else refers to the new task. A copy would take four times as long.
    set_field = msgspec.structs.force_setattr
    set_field(listed, "manifest", manifest)
    if listed.result is not None:
        if listed.final_message is None:
            message = final_message_in_result(_agent_result_decoder.decode(listed.result).result)
            set_field(listed, "final_message", message)
        set_field(listed, "result", None)
    if listed.artifacts:
        set_field(listed, "artifacts", ())
    task: Task = listed
    return task


def without_patch(repository: Repository) -> Repository:
    """Return the repository without its patch."""
    return repository if repository.patch is None else dataclasses.replace(repository, patch=None)


PagePosition = tuple[int | str | None, str]
"""The value of the sort field (times in microseconds since 1970, UTC; costs in nanodollars) and the task's id."""

IdAndSortValue = tuple[str, int | str | None]
"""A task's id and the value of its sort field."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DIGITS_MAX = 18
_NANODOLLARS = 1_000_000_000
_COST_USD_MAX = 999_999_999.0


def position_of(task: Task, sort: str) -> PagePosition:
    """Return the task's position in the list."""
    if sort == "name":
        return task.manifest.metadata.name, task.id
    if sort == "cost":
        return to_nanodollars(task.progress.cost_usd), task.id
    at: datetime | None = getattr(task, sort)
    return None if at is None else to_microseconds(at), task.id


def to_cursor(position: PagePosition) -> Cursor:
    """Convert a position to a cursor."""
    value, task_id = position
    return Cursor(None if value is None else str(value), task_id)


def cursor_position(query: TaskQuery) -> PagePosition | None:
    """Return the position after which a query starts, or None for the beginning. Raises InvalidCursorError."""
    cursor = query.cursor
    if cursor is None:
        return None
    value, task_id = cursor.value, cursor.task_id
    if not all(_is_valid_text(text) for text in (task_id, value or "")):
        raise InvalidCursorError
    if value is None and query.sort == "started_at":
        return None, task_id
    if value is not None and query.sort == "name":
        return value, task_id
    digits = (value or "").removeprefix("-")
    if value is None or not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS_MAX):
        raise InvalidCursorError
    return int(value), task_id


def to_microseconds(at: datetime) -> int:
    """Convert a time to microseconds since 1970 (UTC), without loss of precision."""
    return (at - _EPOCH) // _MICROSECOND


def to_nanodollars(cost_usd: float) -> int:
    """Convert a cost to nanodollars, without loss of precision. A damaged journal may have an impossible cost."""
    return round(min(max(cost_usd, 0.0), _COST_USD_MAX) * _NANODOLLARS)


def _is_valid_text(text: str) -> bool:
    """Return whether the text has no lone surrogate, which SQLite would reject."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


_SORT_ROWS_MAX = 1000
"""Up to this number of matching tasks, sorting them is faster than reading tasks in order until a page is full."""

_SORT_FOUND_MAX = 2000
"""Up to this number of tasks found by a search, sorting them is faster than reading tasks in order."""

_FIRST_WINDOW_FACTOR_MAX = 3
_WINDOW_FACTOR_MAX = 30
"""Maximum sizes of the first and the last window, as multiples of the needed rows.

If a larger window is needed, all found tasks are sorted.
"""

_WINDOW_MARGIN = 1.5
"""Factor by which a window exceeds the size that the expected number of found tasks requires."""

_WINDOW_GROWTH_MIN = 3
"""Minimum factor by which a window is larger than the one before."""

_FOUND_NUMBERS_MAX = 20_000
_WINDOW_SPREAD_MAX = 4
"""Maximum range of the task numbers in a window, as a multiple of the window's size, for reading tasks in order.

Applies if a search finds more than _FOUND_NUMBERS_MAX tasks. In a wider range, a window would have to be compared with
too many found tasks.
"""

_TIME_MAX = 2**63 - 1


class ListedRow(NamedTuple):
    """A task's position in the list, and the task or why its row cannot be decoded."""

    id: str
    value: int | str | None
    task: Task | IndexDamagedError


DecodeRow = Callable[[str, int | str | None, bytes], ListedRow]
"""Decodes a row: a task's id, the value of its sort field and its data, which may be large: read one row at a time."""


class ListedPage(NamedTuple):
    """The rows of a page, one more row if another page follows, and the totals of all pages."""

    rows: list[ListedRow]
    totals: TaskTotals


class PageReader:
    """Reads the page of one query. The constructor raises InvalidCursorError."""

    def __init__(self, sql: Mapping[str, str], query: TaskQuery) -> None:
        self._sql = sql
        self._query = query
        self._terms = query_terms(query)
        self._values: dict[str, object] = {"terms": self._terms, "limit": query.limit + 1, "offset": query.offset}
        self._has_period = query.created_after is not None or query.created_before is not None
        state_filters, self._period_filters = self._build_state_filters(), self._build_period_filters()
        self._filters = [*state_filters, *self._period_filters]
        in_order = self._period_filters if query.sort == "created_at" else [sql["filter_created_in_order"]]
        self._page_filters = [*state_filters, *(in_order if self._has_period else [])]
        self._cursor_filters = self._build_cursor_filters()

    def read(self, connection: sqlite3.Connection, decode: DecodeRow) -> ListedPage:
        """Return the page. The cost in its totals is 0 unless the query requests it."""
        if len(self._query.labels) > LABELS_MAX:
            return ListedPage([], TaskTotals())
        count, *costs = connection.execute(self._totals_statement(), self._values).fetchone()
        totals = TaskTotals(int(count), round(sum(costs) / _NANODOLLARS, 9))
        if not totals.tasks:
            return ListedPage([], totals)
        read = self._read_found if self._terms else self._read_filtered
        return ListedPage(read(connection, totals.tasks, decode), totals)

    def _totals_statement(self) -> str:
        """Return the statement that counts the matching tasks and, if the query requests it, adds up their costs."""
        if self._terms:
            if self._query.with_totals:
                return self._format("totals_found", self._period_filters)
            name = "count_found_in_period" if self._has_period else "count_found"
            return self._format(name, self._period_filters)
        if not self._filters and not self._query.with_totals:
            return self._sql["count_all"]
        name = "totals_filtered" if self._query.with_totals else "count_filtered"
        if self._query.states and not self._has_period:
            return self._format(name, [self._sql["filter_in_states"]])
        return self._format(name, self._filters)

    def _read_filtered(self, connection: sqlite3.Connection, count: int, decode: DecodeRow) -> list[ListedRow]:
        """Read a page without a search."""
        if self._query.states and not self._has_period and count <= _SORT_ROWS_MAX:
            page = self._format("page_of_rare_states", self._cursor_filters)
        else:
            page = self._format("task_page", [*self._page_filters, *self._cursor_filters])
        return [decode(*row) for row in connection.execute(page, self._values)]

    def _read_found(self, connection: sqlite3.Connection, count: int, decode: DecodeRow) -> list[ListedRow]:
        """Read a page of search results: sort the found tasks, or read in order if many tasks match."""
        positions = self._find_in_order(connection, count) if count > _SORT_FOUND_MAX else None
        if positions is None:
            page = self._format("found_page", [*self._period_filters, *self._cursor_filters])
            return [decode(*row) for row in connection.execute(page, self._values)]
        ids, values = msgspec.json.encode([task_id for task_id, _ in positions]).decode(), dict(positions)
        rows = connection.execute(self._sql["encoded_tasks"], {"ids": ids})
        decoded = {task_id: decode(task_id, values[task_id], encoded) for task_id, encoded in rows}
        return [decoded.get(task_id) or decode(task_id, value, b"") for task_id, value in positions]

    def _find_in_order(self, connection: sqlite3.Connection, count: int) -> list[IdAndSortValue] | None:
        """Read growing windows of tasks in order until the found tasks fill the page; None if too few are found.

        The first window suffices if the found tasks are spread evenly over all tasks. The next window suffices if the
        share of found tasks in it is the same as in the one before.
        """
        first, last = self._query.offset, self._query.offset + self._query.limit + 1
        statement = self._format("next_positions", [*self._page_filters, *self._cursor_filters])
        [last_number] = connection.execute(self._sql["last_number"]).fetchone()
        factor = min(max(_WINDOW_MARGIN * last_number / count, 1.0), _FIRST_WINDOW_FACTOR_MAX)
        while True:
            window = math.ceil(last * min(factor, _WINDOW_FACTOR_MAX))
            positions = connection.execute(statement, self._values | {"window": window}).fetchall()
            found = self._select_found(connection, positions, count)
            if len(found) >= last:
                return found[first:last]
            if factor >= _WINDOW_FACTOR_MAX or len(positions) < window:
                return None
            factor *= max(_WINDOW_MARGIN * last / max(len(found), 1), _WINDOW_GROWTH_MIN)

    def _select_found(
        self, connection: sqlite3.Connection, positions: Sequence[tuple[str, int | str | None, int | None]], count: int
    ) -> list[IdAndSortValue]:
        """Return the positions in a window that the search finds; empty if the comparison would take too long."""
        numbers = [number for *_, number in positions if number is not None]
        if not numbers:
            return []
        is_spread = max(numbers) - min(numbers) > len(positions) * _WINDOW_SPREAD_MAX
        if is_spread and count > _FOUND_NUMBERS_MAX:
            return []
        bounds = {"first": min(numbers), "last": max(numbers)}
        statement = self._format("found_numbers", [])
        found = {number for (number,) in connection.execute(statement, self._values | bounds)}
        return [(task_id, value) for task_id, value, number in positions if number in found]

    def _build_state_filters(self) -> list[str]:
        if not self._query.states:
            return []
        self._values["states"] = msgspec.json.encode(sorted(self._query.states)).decode()
        return [self._sql["filter_states"]]

    def _build_period_filters(self) -> list[str]:
        if not self._has_period:
            return []
        after, before = self._query.created_after, self._query.created_before
        self._values["created_after"] = -_TIME_MAX if after is None else to_microseconds(after)
        self._values["created_before"] = _TIME_MAX if before is None else to_microseconds(before)
        return [self._sql["filter_created"]]

    def _build_cursor_filters(self) -> list[str]:
        position = cursor_position(self._query)
        if position is None:
            return []
        value, task_id = position
        self._values |= {"cursor_value": value, "cursor_id": task_id}
        sort, comparison = self._query.sort, "<" if self._query.order == "desc" else ">"
        kind = "null" if value is None else "nullable" if sort == "started_at" else "value"
        return [self._sql[f"filter_after_{kind}"].format(sort=sort, comparison=comparison)]

    def _format(self, name: str, conditions: list[str]) -> str:
        filters = " AND ".join(conditions) or self._sql["filter_none"]
        return self._sql[name].format(filters=filters, sort=self._query.sort, order=self._query.order)
