"""The contract of the task index, tested against each implementation."""

import random
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest

from doubles.manifests import claude
from doubles.memory_store import MemoryStore
from sandbox.interfaces.store import ChangePosition, Cursor, IndexedTask, InvalidCursorError, TaskQuery, TaskTotals
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import LABELS_MAX, SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.manifest.schema import AgentSection, Manifest, Metadata, Repository
from sandbox.model.task import Attempt, StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

NOON = datetime(2026, 1, 29, 12, 0, 0, 250001, tzinfo=UTC)


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "index #1?.sqlite")
    yield store
    store.close()


def minutes_after_noon(minutes):
    return NOON + timedelta(minutes=minutes)


def task(
    task_id,
    state=TaskState.PENDING,
    *,
    created=0,
    started=None,
    changed=None,
    name="task",
    labels=None,
    prompt="Fix it",
    url="https://git.example.org/repo.git",
    cost=0.0,
):
    """Create a task whose history matches these times."""
    history = [StateHistoryEntry(TaskState.PENDING, minutes_after_noon(created))]
    if started is not None:
        history.append(StateHistoryEntry(TaskState.RUNNING, minutes_after_noon(started)))
    if state is not history[-1].state:
        history.append(StateHistoryEntry(state, minutes_after_noon(created + 100 if changed is None else changed)))
    manifest = Manifest(
        metadata=Metadata(name=name, id=task_id, labels=labels or {}),
        repository=Repository(url=url, branch="main"),
        agent=claude(prompt=prompt),
    )
    progress = e.Progress(cost_usd=cost)
    return Task(task_id, manifest, state, f"is {state}", tuple(history), last_seq=len(history), progress=progress)


ARTIFACTS = (Artifact("a.patch", ".sandbox/a.patch", 5, "text/x-diff", "sha256:00"),)


def ids(page):
    return [task.id for task in page.tasks]


def test_loaded_task_equals_the_saved_task(store):
    complete = Task(
        **{
            **{name: getattr(task("full", TaskState.FAILED, started=5), name) for name in Task.__struct_fields__},
            "attempt": Attempt("abcdefghijkl", "bubblewrap", "host-1", base_commit="f" * 40),
            "cancel": e.CancelRequested("why", force=True),
            "failure": Failure(FailureCode.AGENT_FAILED, "It failed."),
            "exit_code": 137,
            "result": {"subtype": "error", "usage": {"n": [1, 2.5, None, "é\u2028\x00"]}},
            "progress": e.Progress(output_bytes=2**40, last_activity_at=NOON, cost_usd=0.25),
            "artifacts": ARTIFACTS,
        }
    )
    complete = with_texts(complete, "Do é\u2028\n" * 9, "ZGlmZg==")
    store.save(IndexedTask(complete, 4711))

    assert store.load("full") == IndexedTask(complete, 4711)
    assert store.query(TaskQuery()).tasks == [
        as_task_item(msgspec.structs.replace(complete, artifacts=(), result=None))
    ]


def as_task_item(task):
    manifest = task.manifest
    agent = AgentSection("", {"prompt": "", "model": ""})
    repository = replace(manifest.repository, patch=None)
    return msgspec.structs.replace(task, manifest=manifest.replace(agent=agent, repository=repository))


def with_texts(task, prompt, patch):
    manifest = task.manifest
    agent, repository = manifest.agent.with_prompt(prompt), replace(manifest.repository, patch=patch)
    return msgspec.structs.replace(task, manifest=manifest.replace(agent=agent, repository=repository))


def test_queries_for_one_task_include_artifacts_and_prompt(store):
    all_ids = with_texts(msgspec.structs.replace(task("a"), artifacts=ARTIFACTS), "Do it.", "ZGlmZg==")
    indexed = IndexedTask(msgspec.structs.replace(all_ids, idempotency=e.Idempotency("k", "0")), 1)
    store.save(indexed)
    assert store.unfinished() == [indexed]
    assert store.find_by_idempotency_key("k", NOON) == indexed


def test_prompt_beginnings_are_keyed_by_id(store):
    for task_id, prompt in (("a", "Fix it."), ("b", "Größe ändern"), ("c", "Other")):
        store.save(IndexedTask(with_texts(task(task_id), prompt, None), 1))
    assert store.prompt_beginnings(["a", "absent"], 100) == {"a": "Fix it."}
    assert store.prompt_beginnings([], 100) == {}
    shortened = store.prompt_beginnings(["a", "b"], 4)
    assert shortened["a"] == "Fix "
    assert shortened["b"] in {"Grö", "Größ"}


def test_load_of_an_unknown_task_returns_none(store):
    store.save(IndexedTask(task("a"), 1))
    assert store.load("b") is None


def test_state_lacks_the_fields_that_can_have_megabytes(store):
    complete = msgspec.structs.replace(task("a", TaskState.FAILED, started=5), result={"n": 1}, artifacts=ARTIFACTS)
    store.save(IndexedTask(with_texts(complete, "Do it.", "ZGlmZg=="), 3))
    state = with_texts(msgspec.structs.replace(complete, result=None, artifacts=()), "", None)
    assert store.load_without_large_fields("a") == IndexedTask(state, 3)
    assert store.load_without_large_fields("b") is None


def test_save_replaces_the_task(store):
    store.save(IndexedTask(task("a", name="old", labels={"stay": "1", "go": "1", "turn": "1"}), 1))
    later = IndexedTask(task("a", TaskState.COMPLETED, started=3, name="new", labels={"stay": "1", "turn": "2"}), 99)
    store.save(later)

    assert store.load("a") == later
    assert store.unfinished() == []
    for labels, expected_ids in [
        ({"stay": "1"}, ["a"]),
        ({"turn": "2"}, ["a"]),
        ({"turn": "1"}, []),
        ({"go": "1"}, []),
    ]:
        assert ids(store.query(TaskQuery(labels=labels))) == expected_ids


def test_save_adds_an_unknown_task(store):
    store.save(IndexedTask(task("a", labels={"k": "v"}), 7))

    assert store.load("a").offset == 7
    assert ids(store.query(TaskQuery(labels={"k": "v"}))) == ["a"]


def test_unfinished_tasks_are_listed_oldest_first(store):
    for number, state in enumerate(TaskState):
        store.save(IndexedTask(task(f"t{number}", state, created=-number), number))
    store.save(IndexedTask(task("t0-twin"), 0))

    unfinished = store.unfinished()

    expected = [indexed.task.id for indexed in unfinished]
    assert expected == ["t5", "t4", "t3", "t2", "t1", "t0", "t0-twin"]
    assert [indexed.offset for indexed in unfinished] == [5, 4, 3, 2, 1, 0, 0]


def test_all_states_are_counted(store):
    assert store.count_by_state() == dict.fromkeys(TaskState, 0)
    for number, state in enumerate([TaskState.RUNNING, TaskState.RUNNING, TaskState.FAILED]):
        store.save(IndexedTask(task(str(number), state), 0))

    counts = store.count_by_state()

    assert counts == {**dict.fromkeys(TaskState, 0), TaskState.RUNNING: 2, TaskState.FAILED: 1}


def test_all_task_ids_are_returned(store):
    assert store.task_ids() == frozenset()
    for name in ("b", "a"):
        store.save(IndexedTask(task(name), 0))
    assert store.task_ids() == {"a", "b"}


def test_pages_list_the_newest_tasks_first_by_default(store):
    for number in range(5):
        store.save(IndexedTask(task(f"t{number}", created=number), 0))
    page = store.query(TaskQuery(limit=2, offset=1))
    assert (ids(page), page.total_count) == (["t3", "t2"], 5)
    assert ids(store.query(TaskQuery(limit=2, offset=4))) == ["t0"]
    past_end = store.query(TaskQuery(limit=2, offset=5))
    assert (ids(past_end), past_end.total_count) == ([], 5)


@pytest.mark.parametrize(
    ("sort", "ascending"),
    [
        ("created_at", ["c", "b", "a", "d"]),
        ("started_at", ["b", "a", "c", "d"]),
        ("state_changed_at", ["d", "a", "c", "b"]),
        ("name", ["b", "d", "a", "c"]),
        ("cost", ["d", "b", "c", "a"]),
    ],
)
def test_tasks_are_sorted_by_each_field_with_unstarted_tasks_last(store, sort, ascending):
    store.save(IndexedTask(task("a", TaskState.COMPLETED, created=3, started=20, changed=30, name="b", cost=12.5), 0))
    store.save(
        IndexedTask(task("b", TaskState.COMPLETED, created=2, started=10, changed=50, name="B", cost=0.000000002), 0)
    )
    store.save(IndexedTask(task("c", TaskState.CANCELLED, created=1, changed=40, name="é", cost=3.0), 0))
    store.save(IndexedTask(task("d", created=4, name="a"), 0))

    descending = ["a", "b", "d", "c"] if sort == "started_at" else ascending[::-1]
    assert ids(store.query(TaskQuery(sort=sort, order="asc"))) == ascending
    assert ids(store.query(TaskQuery(sort=sort, order="desc"))) == descending


@pytest.mark.parametrize("sort", ["created_at", "started_at", "state_changed_at", "name", "cost"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_tasks_with_equal_values_neither_repeat_nor_skip_tasks(store, sort, order):
    for number in [7, 3, 9, 1, 5, 0, 8, 2, 6, 4]:
        started = 1 if number % 3 else None
        store.save(IndexedTask(task(f"t{number}", TaskState.COMPLETED, started=started, changed=9), 0))

    pages = [store.query(TaskQuery(sort=sort, order=order, limit=3, offset=offset)) for offset in range(0, 12, 3)]
    collected = [task_id for page in pages for task_id in ids(page)]

    assert sorted(collected) == [f"t{number}" for number in range(10)]
    if sort != "started_at":
        assert collected == sorted(collected, reverse=order == "desc")


SORTS = ["created_at", "started_at", "state_changed_at", "name", "cost"]


def list_all_ids(store, **filters):
    """Return all ids, page by page, until there is no next cursor."""
    collected, page = [], store.query(TaskQuery(**filters))
    while True:
        collected += ids(page)
        if page.next_cursor is None:
            return collected
        page = store.query(TaskQuery(**{**filters, "cursor": page.next_cursor}))


@pytest.fixture
def store_with_mixed_tasks(store):
    """Tasks with equal and different values. Some never started."""
    for number in range(12):
        times = {"created": number % 5, "started": number % 4 or None, "changed": 50 + number % 3}
        others = {"name": f"n{number % 2}", "labels": {"odd": str(number % 2)}, "cost": number % 3 / 10}
        new_task = task(f"t{number:02}", TaskState.COMPLETED, **times, **others)
        store.save(IndexedTask(new_task, 0))
    return store


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 4, 12, 100])
def test_pages_together_equal_the_unpaged_list(store_with_mixed_tasks, sort, order, limit):
    all_ids = ids(store_with_mixed_tasks.query(TaskQuery(sort=sort, order=order)))
    assert len(all_ids) == 12
    assert list_all_ids(store_with_mixed_tasks, sort=sort, order=order, limit=limit) == all_ids


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_cursor_pages_are_stable_while_tasks_change(store_with_mixed_tasks, sort, order):
    first = store_with_mixed_tasks.query(TaskQuery(sort=sort, order=order, limit=6))
    unseen = ids(store_with_mixed_tasks.query(TaskQuery(sort=sort, order=order)))[6:]
    for number, name in enumerate(["a-new", "z-new"]):
        store_with_mixed_tasks.save(IndexedTask(task(name, created=number * 50, name=name, cost=number), 0))
    first_id = first.tasks[0].id
    store_with_mixed_tasks.save(
        IndexedTask(task(first_id, TaskState.FAILED, created=99, started=99, changed=999, name="zzz", cost=9), 1)
    )

    rest = list_all_ids(store_with_mixed_tasks, sort=sort, order=order, limit=2, cursor=first.next_cursor)

    assert [task_id for task_id in rest if task_id in unseen] == unseen
    assert len(rest) == len(set(rest))


def test_last_page_has_no_cursor_and_offset_is_relative_to_the_cursor(store_with_mixed_tasks):
    page = store_with_mixed_tasks.query(TaskQuery(limit=6, labels={"odd": "1"}))
    assert (len(page.tasks), page.total_count, page.next_cursor) == (6, 6, None)
    first = store_with_mixed_tasks.query(TaskQuery(limit=3))
    assert ids(store_with_mixed_tasks.query(TaskQuery(limit=2, offset=4, cursor=first.next_cursor))) == ids(
        store_with_mixed_tasks.query(TaskQuery(limit=2, offset=7))
    )
    assert store_with_mixed_tasks.query(TaskQuery(limit=3, cursor=first.next_cursor)).total_count == 12
    assert store_with_mixed_tasks.query(TaskQuery(limit=3, offset=100)).next_cursor is None


@pytest.mark.parametrize(
    ("sort", "value"),
    [
        ("created_at", None),
        ("created_at", "name"),
        ("created_at", "9" * 40),
        ("created_at", "\u0663"),
        ("started_at", ""),
        ("name", None),
        ("name", "\ud800"),
        ("cost", None),
        ("cost", "0.5"),
    ],
)
def test_cursor_of_another_sort_order_is_rejected(store_with_mixed_tasks, sort, value):
    with pytest.raises(InvalidCursorError):
        store_with_mixed_tasks.query(TaskQuery(sort=sort, cursor=Cursor(value, "t01")))


@pytest.mark.parametrize("count", [20, 275])
@pytest.mark.parametrize("sort", SORTS)
def test_filters_are_independent_of_the_query_plan(store, monkeypatch, count, sort):
    monkeypatch.setattr("sandbox.store.listing._SORT_ROWS_MAX", 25)
    if isinstance(store, SqliteStore):
        store._connections.writer.execute("PRAGMA synchronous = OFF")
    expected = set()
    for number in range(count):
        state = [TaskState.COMPLETED, TaskState.FAILED, TaskState.RUNNING][number % 3]
        labels = {"all": "yes", "half": str(number % 2), "tenth": str(number % 10)}
        started = number if number % 4 else None
        new_task = task(
            *(f"t{number:04}", state),
            **{"created": number % 50, "started": started, "name": f"n{number % 7}", "cost": number % 5 / 7},
            labels=labels,
        )
        store.save(IndexedTask(new_task, 0))
        if state is not TaskState.RUNNING and number % 2 == 0:
            expected.add(new_task.id)
    filters = {
        "labels": {"all": "yes", "half": "0"},
        "states": frozenset({TaskState.COMPLETED, TaskState.FAILED}),
        "sort": sort,
    }

    assert store.query(TaskQuery(**filters)).total_count == len(expected)
    collected = list_all_ids(store, **filters, limit=7)
    assert (len(collected), set(collected)) == (len(expected), expected)
    failed = frozenset({TaskState.FAILED})
    assert len(list_all_ids(store, states=failed, sort=sort, limit=9)) == store.count_by_state()[TaskState.FAILED]
    assert list_all_ids(store, states=failed, sort=sort, limit=9) == list_all_ids(
        store, states=failed, sort=sort, limit=1000
    )
    label_query = TaskQuery(labels={"half": "0", "tenth": "4"}, limit=1000)
    assert sorted(ids(store.query(label_query))) == [f"t{number:04}" for number in range(4, count, 10)]
    assert store.query(label_query).total_count == len(range(4, count, 10))


def test_totals_cover_all_pages_and_only_matching_tasks(store):
    for number in range(10):
        state = TaskState.FAILED if number % 2 else TaskState.COMPLETED
        labels, prompt = {"half": str(number // 5)}, f"alpha word{number}"
        store.save(IndexedTask(task(f"t{number}", state, created=number, cost=0.1, labels=labels, prompt=prompt), 1))
    failed = frozenset({TaskState.FAILED})
    for filters, totals in (
        ({}, TaskTotals(10, 1.0)),
        ({"limit": 3, "offset": 5}, TaskTotals(10, 1.0)),
        ({"states": failed}, TaskTotals(5, 0.5)),
        ({"labels": {"half": "0"}}, TaskTotals(5, 0.5)),
        ({"search": "alpha", "states": failed}, TaskTotals(5, 0.5)),
        ({"created_after": minutes_after_noon(3)}, TaskTotals(7, 0.7)),
        ({"created_after": minutes_after_noon(3), "states": failed}, TaskTotals(4, 0.4)),
        ({"created_before": minutes_after_noon(3), "search": "alpha"}, TaskTotals(3, 0.3)),
        ({"search": "nowhere"}, TaskTotals(0, 0.0)),
    ):
        page = store.query(TaskQuery(**filters, with_totals=True))
        assert (page.totals, page.total_count) == (totals, totals.tasks), filters
        assert store.query(TaskQuery(**filters)).totals is None


def test_totals_and_order_follow_the_cost_of_a_running_task(store):
    for task_id, cost in (("a", 0.0), ("b", 0.5)):
        store.save(IndexedTask(task(task_id, TaskState.RUNNING, cost=cost), 1))
    store.save(IndexedTask(task("a", TaskState.RUNNING, cost=0.75), 2))
    for search in ("", "fix"):
        page = store.query(TaskQuery(sort="cost", search=search, with_totals=True))
        assert (ids(page), page.totals) == (["a", "b"], TaskTotals(2, 1.25))
    store.delete("a")
    assert store.query(TaskQuery(with_totals=True)).totals == TaskTotals(1, 0.5)


@pytest.mark.parametrize("cost", [-1.0, 1e300])
def test_impossible_costs_from_a_damaged_journal_can_be_sorted(store, cost):
    store.save(IndexedTask(task("a", cost=cost), 1))
    store.save(IndexedTask(task("b", cost=1.0), 1))
    assert ids(store.query(TaskQuery(sort="cost"))) == (["b", "a"] if cost < 0 else ["a", "b"])


def changed_ids(store, after, limit=100):
    return [each.task.id for each in store.changed_tasks(after, limit)]


def test_changed_tasks_are_sorted_by_their_latest_change(store):
    begin = store.last_change_position()
    assert store.changed_tasks(begin, 10) == []
    for task_id in "abc":
        store.save(IndexedTask(task(task_id), 1))
    assert changed_ids(store, begin) == ["a", "b", "c"]
    middle = store.last_change_position()
    store.save(IndexedTask(task("c", TaskState.RUNNING), 2))
    store.save_all([IndexedTask(task("a", TaskState.RUNNING), 2), IndexedTask(task("c", TaskState.FAILED), 3)])
    changed = store.changed_tasks(middle, 10)
    assert [(each.task.id, each.task.state) for each in changed] == [("a", "running"), ("c", "failed")]
    assert changed[-1].position == store.last_change_position()
    assert changed_ids(store, changed[0].position) == ["c"]
    assert changed_ids(store, begin) == ["b", "a", "c"]
    assert changed_ids(store, begin, limit=2) == ["b", "a"]


def test_only_a_state_change_counts_as_a_change(store):
    store.save(IndexedTask(task("a", TaskState.RUNNING), 1))
    before = store.last_change_position()
    store.save(IndexedTask(task("a", TaskState.RUNNING, cost=2.0, name="new", prompt="new"), 2))
    assert (store.last_change_position(), store.changed_tasks(before, 10)) == (before, [])


def test_deletion_of_a_task_is_not_a_change_and_its_number_is_not_reused(store):
    store.save(IndexedTask(task("a"), 1))
    before = store.last_change_position()
    store.delete("a")
    assert store.changed_tasks(ChangePosition(before.index_id, 0), 10) == []
    store.save(IndexedTask(task("a"), 1))
    assert changed_ids(store, before) == ["a"]


def test_query_with_a_position_from_another_index_returns_all_tasks(store):
    for task_id in "ab":
        store.save(IndexedTask(task(task_id), 1))
    last = store.last_change_position()
    for unknown in (
        ChangePosition("0", 0),
        ChangePosition("0", last.number),
        ChangePosition(last.index_id, last.number + 1),
    ):
        assert changed_ids(store, unknown) == ["a", "b"]
    assert changed_ids(store, last) == []


def test_changed_tasks_have_no_large_fields(store):
    original = with_texts(msgspec.structs.replace(task("a"), artifacts=ARTIFACTS), "Do it.", "ZGlmZg==")
    store.save(IndexedTask(original, 1))
    [changed] = store.changed_tasks(ChangePosition("0", 0), 10)
    expected = as_task_item(msgspec.structs.replace(original, artifacts=()))
    assert changed.task == expected
    assert not changed.task != expected  # noqa: SIM202


def test_cursor_of_a_missing_task_is_valid(store_with_mixed_tasks):
    assert len(ids(store_with_mixed_tasks.query(TaskQuery(cursor=Cursor("0", "gone"), order="asc")))) == 12
    assert (
        ids(store_with_mixed_tasks.query(TaskQuery(sort="name", order="asc", cursor=Cursor("n1", "' OR true; --"))))
        != []
    )


def task_with_idempotency_key(task_id, key, *, created=0):
    return msgspec.structs.replace(task(task_id, created=created), idempotency=e.Idempotency(key, "ab" * 32))


def test_task_is_found_by_its_idempotency_key(store):
    store.save(IndexedTask(task_with_idempotency_key("a", "key-1"), 1))
    store.save(IndexedTask(task_with_idempotency_key("b", "key-2", created=1), 2))
    store.save(IndexedTask(task("c"), 3))

    assert store.find_by_idempotency_key("key-1", NOON) == IndexedTask(task_with_idempotency_key("a", "key-1"), 1)
    assert store.find_by_idempotency_key("key-2", NOON).task.id == "b"
    assert store.find_by_idempotency_key("key-3", NOON) is None
    assert store.find_by_idempotency_key("", NOON) is None


def test_expired_idempotency_key_is_not_found_and_a_reused_key_finds_the_newest_task(store):
    for number, name in enumerate(["old", "new", "newer"]):
        store.save(IndexedTask(task_with_idempotency_key(name, "key", created=number), 0))

    assert store.find_by_idempotency_key("key", NOON).task.id == "newer"
    assert store.find_by_idempotency_key("key", minutes_after_noon(2)).task.id == "newer"
    assert store.find_by_idempotency_key("key", minutes_after_noon(2) + timedelta(microseconds=1)) is None


def test_tasks_are_filtered_by_state(store):
    for number, state in enumerate(TaskState):
        store.save(IndexedTask(task(f"t{number}", state, created=number), 0))
    states = frozenset({TaskState.RUNNING, TaskState.FAILED})

    page = store.query(TaskQuery(states=states, order="asc", limit=1))

    assert ([task.state for task in page.tasks], page.total_count) == ([TaskState.RUNNING], 2)
    assert ids(store.query(TaskQuery(states=states, order="asc", limit=1, offset=1))) == ["t7"]


def test_tasks_must_match_all_labels(store):
    store.save(IndexedTask(task("a", labels={"team": "x", "env": "prod"}), 0))
    store.save(IndexedTask(task("b", TaskState.RUNNING, labels={"team": "x", "env": "test"}), 0))
    store.save(IndexedTask(task("c", labels={"x": "team"}), 0))

    def find_ids(labels, **filters):
        page = store.query(TaskQuery(labels=labels, order="asc", **filters))
        assert page.total_count == len(page.tasks)
        return sorted(ids(page))

    assert find_ids({"team": "x"}) == ["a", "b"]
    assert find_ids({"team": "x", "env": "prod"}) == ["a"]
    assert find_ids({"team": "x"}, states=frozenset({TaskState.RUNNING})) == ["b"]
    assert find_ids({"team": "x", "env": "none"}) == []
    assert find_ids({"team": ""}) == []


@pytest.mark.parametrize("text", ["'; DROP TABLE tasks; --", "a\x00b", "%", "{}", "é\u2028", 'quo"te', ":key_0", ""])
def test_any_text_can_be_a_label_or_a_name(store, text):
    store.save(IndexedTask(task("odd", name=text, labels={text: text}), 0))
    store.save(IndexedTask(task("other", name="a", labels={text[:1]: "a"}), 0))

    assert ids(store.query(TaskQuery(labels={text: text}))) == ["odd"]
    assert store.load("odd").task.manifest.metadata.labels == {text: text}


def test_more_labels_than_a_task_can_have_match_nothing(store):
    expected = {f"k{number}": "v" for number in range(3000)}
    store.save(IndexedTask(task("a", labels={"k0": "v"}), 0))
    assert ids(store.query(TaskQuery(labels=expected))) == []
    for number in range(0, len(expected), LABELS_MAX):
        subset = dict(list(expected.items())[number : number + LABELS_MAX])
        store.save(IndexedTask(task(f"t{number}", labels=subset), 0))
        assert ids(store.query(TaskQuery(labels=subset))) == [f"t{number}"]
    page = store.query(TaskQuery(labels=expected))
    assert (ids(page), page.total_count) == ([], 0)


def test_concurrent_readers_see_complete_changes(store):
    store.save(IndexedTask(task("a", name="0", labels={"round": "0"}), 0))
    done, inconsistent, reads = threading.Event(), [], []

    def read_repeatedly():
        while not done.is_set():
            page = store.query(TaskQuery())
            [listed_task] = page.tasks
            indexed = store.load("a")
            if page.total_count != 1 or listed_task.manifest.metadata.labels != {
                "round": listed_task.manifest.metadata.name
            }:
                inconsistent.append(page)
            if str(indexed.offset) != indexed.task.manifest.metadata.name:
                inconsistent.append(indexed)
            reads.append(1)

    threads = [threading.Thread(target=read_repeatedly) for _ in range(6)]
    for thread in threads:
        thread.start()
    number = 0
    try:
        while number < 100 or (len(reads) < 100 and number < 100_000):
            number += 1
            store.save(IndexedTask(task("a", name=str(number), labels={"round": str(number)}), number))
    finally:
        done.set()
        for thread in threads:
            thread.join(10)
    assert not inconsistent
    assert len(reads) >= 100
    assert store.load("a").offset == number


def find(store, search="", **filters):
    page = store.query(TaskQuery(search=search, order="asc", **filters))
    assert page.total_count == len(page.tasks)
    return ids(page)


@pytest.mark.parametrize(
    "search",
    [
        "parser",
        "PARS",
        "fix pars",
        "  fix\t, the-parser\n",
        "test_parse_date",
        "parse date",
        "nightly-7",
        "7 nightly fix",
        "acme/mailer",
        "git.example.org",
        "Größe",
        "grosse",
        "GRÖSSE",
        "cafe",
        "café",
        "cafe\u0301",
        "修复",
        "测试 修",
        "naïve ﬁx",
        "supercalifragilisticexpialidocious",
        "supercalifragilistic",
    ],
)
def test_search_finds_the_beginnings_of_words(store, search):
    prompt = "Fix the parser: test_parse_date of the Größe, naïve café 修复测试 supercalifragilisticexpialidocious"
    store.save(IndexedTask(task("nightly-7", prompt=prompt, url="https://git.example.org/Acme/mailer.git"), 1))
    store.save(IndexedTask(task("other", prompt="Something else", url="https://example.com/repo"), 1))

    assert find(store, search) == ["nightly-7"]


@pytest.mark.parametrize("search", ["arser", "fix nowhere", "https", "main", "fixx", "team", "ü", "nightly7"])
def test_search_does_not_find_other_words(store, search):
    labels = {"team": "team"}
    store.save(IndexedTask(task("nightly-7", prompt="Fix the parser", name="n", labels=labels), 1))

    assert find(store, search) == []


@pytest.mark.parametrize(
    "search",
    [
        "fix OR nowhere",
        "fix AND nowhere",
        "nowhere OR fix",
        "fix NOT nowhere",
        "NEAR(fix nowhere)",
        "terms:nowhere",
        "fix nowhere*",
        '"fix nowhere"',
        '" OR fix --nowhere',
        "') OR 1=1 -- nowhere",
        "fix\x00nowhere",
        "fix \ud800 nowhere",
        "\ue000nowhere",
        "nowhere" * 1500,
        "nowhere " * 1500,
    ],
)
def test_search_text_is_not_parsed_as_query_syntax(store, search):
    store.save(IndexedTask(task("a", prompt="fix not near or and terms 1 it"), 1))
    twin = search.replace("nowhere", "it")
    store.save(IndexedTask(task("b", prompt="never " + twin[:500].replace("\ud800", "?")), 1))

    assert find(store, search) == []
    assert "b" in find(store, twin[:300])


@pytest.mark.parametrize("search", ["", " ", "!?", "\x00", "*", '"', "\ue002pending", "\ud800", "'"])
def test_search_without_words_matches_each_task(store, search):
    store.save(IndexedTask(task("a", prompt="pending"), 1))
    store.save(IndexedTask(task("b", prompt="nothing"), 1))

    assert find(store, search) == (["a"] if "pending" in search else ["a", "b"])


def test_search_covers_the_beginning_of_a_prompt(store):
    prompt = "early " + "x" * (SEARCHED_PROMPT_CHARACTERS_MAX - 12) + " mid late"
    store.save(IndexedTask(task("a", prompt=prompt), 1))

    assert find(store, "early mid") == ["a"]
    assert find(store, "late") == []
    assert store.load("a").task.manifest.agent.prompt == prompt


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/Acme/Mailer.git",
        "https://github.com/Acme/Mailer",
        "https://github.com:443/Acme/Mailer/",
        "ssh://git@github.com/Acme/Mailer.git",
        "ssh://git@github.com:22/Acme/Mailer.git",
        "git@github.com:Acme/Mailer.git",
    ],
)
def test_tasks_are_filtered_by_repository(store, url):
    store.save(IndexedTask(task("a", url=url), 1))
    store.save(IndexedTask(task("b", url="https://github.com/acme/mailer-2.git", prompt="acme/mailer"), 1))
    store.save(IndexedTask(task("c", url="https://github.com:8443/acme/mailer-3"), 1))

    for name in (
        "acme/mailer",
        "Acme/Mailer.git",
        "github.com/acme/mailer",
        "https://user:pw@github.com/acme/mailer",
        "mailer",
        "Mailer.git",
        url,
    ):
        assert find(store, repository=name) == ["a"]
    for name in (
        "mail",
        "mailer-",
        "acme",
        "github.com",
        "/",
        "https://",
        "acme/mail",
        "gitlab.com/acme/mailer",
        "*",
        "\x00",
    ):
        assert find(store, repository=name) == []
    assert find(store, repository="github.com:8443/acme/mailer-3") == ["c"]
    assert find(store, repository="acme/mailer-3") == ["c"]
    assert find(store, repository="mailer-3") == ["c"]


def continuing(task, parent):
    return msgspec.structs.replace(task, parent=e.Parent(parent, "0" * 40, ()))


def test_tasks_are_filtered_by_the_task_that_they_rerun(store):
    for name, origin in (("a", None), ("b", "a"), ("c", "a"), ("d", "b")):
        store.save(IndexedTask(msgspec.structs.replace(task(name, prompt="alpha"), rerun_of=origin), 1))
    store.save(IndexedTask(continuing(task("e", prompt="alpha"), "a"), 1))

    assert find(store, rerun_of="a") == ["b", "c"]
    assert find(store, "alpha", rerun_of="b") == ["d"]
    assert (find(store, rerun_of="d"), find(store, parent="a", rerun_of="a")) == ([], [])
    store.save(IndexedTask(msgspec.structs.replace(task("a", prompt="alpha"), rerun_of="z"), 2))
    assert find(store, rerun_of="z") == ["a"]
    store.delete("b")
    assert find(store, rerun_of="a") == ["c"]


def test_tasks_are_filtered_by_the_task_that_they_continue(store):
    store.save(IndexedTask(task("a", prompt="alpha"), 1))
    for name, parent in (("b", "a"), ("c", "a"), ("d", "b"), ("e", "A")):
        store.save(IndexedTask(continuing(task(name, prompt="alpha"), parent), 1))

    assert find(store, parent="a") == ["b", "c"]
    assert find(store, parent="b") == ["d"]
    assert find(store, "alpha", parent="a", states=frozenset({TaskState.PENDING})) == ["b", "c"]
    assert (find(store, "beta", parent="a"), find(store, parent="d"), find(store, parent="\ud800*")) == ([], [], [])
    store.save(IndexedTask(continuing(task("b", TaskState.FAILED, prompt="alpha"), "a"), 2))
    assert find(store, parent="a", states=frozenset({TaskState.FAILED})) == ["b"]
    store.delete("b")
    assert find(store, parent="a") == ["c"]


def test_search_distinguishes_failed_tasks_with_and_without_a_sandbox(store):
    for state in TaskState:
        store.save(IndexedTask(task(state.value, state, prompt="alpha preserved failed"), 1))

    for state in TaskState:
        assert find(store, "alpha", states=frozenset({state})) == [state.value]
    both = frozenset({TaskState.FAILED, TaskState.FAILED_PRESERVED})
    assert find(store, "alpha", states=both) == ["failed", "failed_preserved"]


def test_tasks_are_filtered_by_creation_time(store):
    for number in range(5):
        store.save(IndexedTask(task(f"t{number}", created=number), 1))

    assert find(store, created_after=minutes_after_noon(1), created_before=minutes_after_noon(3)) == ["t1", "t2"]
    assert find(store, created_after=minutes_after_noon(3)) == ["t3", "t4"]
    assert find(store, created_before=minutes_after_noon(1)) == ["t0"]
    assert find(store, created_after=minutes_after_noon(3), created_before=minutes_after_noon(1)) == []
    assert find(store, created_after=minutes_after_noon(3).astimezone(timezone(timedelta(hours=5)))) == ["t3", "t4"]
    assert find(store, created_after=datetime.min.replace(tzinfo=UTC), created_before=datetime.max.replace(tzinfo=UTC))


def test_search_follows_changes_of_a_task(store):
    pending, failed = frozenset({TaskState.PENDING}), frozenset({TaskState.FAILED})
    store.save(IndexedTask(task("a", prompt="alpha"), 1))
    store.save(IndexedTask(task("b", prompt="alpha"), 1))
    assert find(store, "alpha", states=pending) == ["a", "b"]

    store.save(IndexedTask(task("a", TaskState.FAILED, prompt="alpha"), 2))
    assert (find(store, "alpha", states=pending), find(store, "alpha", states=failed)) == (["b"], ["a"])
    store.save(IndexedTask(task("a", TaskState.FAILED, prompt="beta", labels={"k": "v"}), 3))
    assert (find(store, "alpha"), find(store, "beta", states=failed, labels={"k": "v"})) == (["b"], ["a"])
    store.delete("a")
    assert (find(store, "beta"), find(store, labels={"k": "v"}), find(store, "alpha")) == ([], [], ["b"])
    store.save(IndexedTask(task("a", prompt="gamma"), 4))
    assert (find(store, "beta"), find(store, "gamma"), find(store, "a", states=failed)) == ([], ["a"], [])


@pytest.mark.parametrize("plan", ["sort", "read in order"])
def test_search_results_match_a_search_without_an_index(tmp_path, monkeypatch, plan):
    monkeypatch.setattr("sandbox.store.listing._SORT_FOUND_MAX", 10_000 if plan == "sort" else 5)
    rng = random.Random(7)
    stores = [MemoryStore(), SqliteStore(tmp_path / "index.sqlite")]
    stores[1]._connections.writer.execute("PRAGMA synchronous = OFF")
    words = ["alpha", "alpine", "beta", "be", "gamma", "delta"]
    states = [TaskState.COMPLETED, TaskState.FAILED, TaskState.RUNNING]
    for number in range(120):
        created = task(
            f"t{number:03}",
            rng.choice(states),
            created=number if number % 5 else 0,
            started=rng.choice([None, number]),
            name=rng.choice(words),
            labels={"team": rng.choice("xyz")},
            prompt=" ".join(rng.choices(words, k=3)),
            url=f"https://git.example.org/{rng.choice('ab')}/repo",
            cost=rng.choice([0.0, 0.1, 0.2, 1e-9, 123.456789012]),
        )
        if number % 3 == 0:
            created = continuing(created, rng.choice(["p", "q"]))
        for each in stores:
            each.save(IndexedTask(created, 1))
            if rng.random() < 0.05:
                each.delete(created.id)
                each.save(IndexedTask(created, 2))
    for _ in range(60):
        query = TaskQuery(
            states=frozenset(rng.sample(states, rng.choice([0, 0, 1, 2]))),
            labels={"team": rng.choice("xyzw")} if rng.random() < 0.3 else {},
            sort=rng.choice(SORTS),
            order=rng.choice(["asc", "desc"]),
            limit=rng.choice([13, 100]),
            offset=rng.choice([0, 0, 5, 100]),
            search=rng.choice(["", "al", "alpha", "b", "t", "gamma delta", "nowhere", "repo"]),
            repository=rng.choice(["", "", "a/repo", "c/repo"]),
            parent=rng.choice(["", "", "", "p", "none"]),
            created_after=rng.choice([None, None, minutes_after_noon(40)]),
            created_before=rng.choice([None, None, minutes_after_noon(80)]),
            with_totals=rng.random() < 0.5,
        )
        while True:
            expected, page = (each.query(query) for each in stores)
            assert page == expected, query
            if page.next_cursor is None:
                break
            query = replace(query, cursor=page.next_cursor, offset=0)
    for each in stores:
        each.close()
