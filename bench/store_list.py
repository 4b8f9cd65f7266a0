"""Measures list queries on a store with many tasks: p50 and p99 of each kind of page, the size per task, the time of an
insert and of an update, and the time until the index of an earlier version becomes searchable.

Run: python bench/store_list.py [TASKS]    (default: 100000)
"""

import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from sandbox.interfaces.store import IndexedTask, TaskQuery
from sandbox.model.events import Progress
from sandbox.model.manifest.schema import AgentSection, Manifest, Metadata, Repository
from sandbox.model.task import Attempt, StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

ROUNDS = 200
SORTS: tuple[Literal["created_at", "started_at", "state_changed_at", "name", "cost"], ...] = (
    *("created_at", "started_at", "state_changed_at"),
    *("name", "cost"),
)
STATES_TO_RUNNING = (TaskState.PENDING, TaskState.STAGING, TaskState.PROVISIONING, TaskState.READY, TaskState.RUNNING)
FINAL_STATES_BY_SHARE = [TaskState.COMPLETED] * 90 + [TaskState.FAILED] * 8 + [TaskState.CANCELLED] * 2
START_TIME = datetime(2026, 1, 1, tzinfo=UTC)


RNG = random.Random(2)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["".join(RNG.choices(LETTERS, k=RNG.randrange(2, 12))) for _ in range(20_000)]


def prompt(number: int) -> str:
    """Return a prompt of about 100 words, most of them common. Half of the prompts contain `half`, and so on."""
    frequent = ["Fix", "the", "failing", "test,", "and", "explain", "in", "one", "paragraph", "why", "it", "failed."]
    words = [VOCABULARY[int(RNG.paretovariate(0.6)) % len(VOCABULARY)] for _ in range(90)]
    marks = [word for word, share in (("half", 2), ("tenth", 10), ("thousandth", 1000)) if number % share == 0]
    return " ".join([*frequent, *words, *marks])


def task(number: int) -> Task:
    """Create a task. Nearly all are finished; one in 10,000 is running."""
    state = FINAL_STATES_BY_SHARE[number % len(FINAL_STATES_BY_SHARE)] if number % 10_000 else TaskState.RUNNING
    at = START_TIME + timedelta(seconds=60 * number)
    labels = {"team": f"team-{number % 10}", "ticket": str(number // 2), "all": "yes"}
    manifest = Manifest(
        metadata=Metadata(name=f"task {number % 1000}", id=f"task-{number:06}", labels=labels),
        repository=Repository(url=f"https://git.example.org/team-{number % 7}/repository.git", branch="main"),
        agent=AgentSection(
            "claude",
            {
                "prompt": prompt(number),
                "model": "claude-sonnet-4-5-20250929",
            },
        ),
    )
    states = STATES_TO_RUNNING[:1] if state is TaskState.CANCELLED else STATES_TO_RUNNING
    history = [StateHistoryEntry(entered, at + timedelta(seconds=index)) for index, entered in enumerate(states)]
    if state is not history[-1].state:
        history.append(StateHistoryEntry(state, at + timedelta(seconds=500 + number % 997)))
    attempt = Attempt("abcdefghijkl", "bubblewrap", "host", "sandbox-abcdefghijkl", "bubblewrap", "host", "c" * 40, "s")
    progress = Progress(10_000, 20, None, at, 12, 100_000, 5_000, number % 997 / 1000)
    return Task(f"task-{number:06}", manifest, state, "It is", tuple(history), 500, attempt, progress=progress)


def fill(path: Path, count: int) -> SqliteStore:
    """Create a store with `count` tasks, without fsync, which is not measured here; print the CPU time of a write."""
    store = SqliteStore(path)
    store._connections.writer.execute("PRAGMA synchronous = OFF")
    inserts, updates = [], []
    for number in range(count):
        each = task(number)
        begin = time.thread_time()
        store.save(IndexedTask(each, 1))
        inserts.append(time.thread_time() - begin)
        if number % 10 == 0:
            history = (*each.history, StateHistoryEntry(each.state, START_TIME))
            progress = msgspec.structs.replace(each.progress, cost_usd=each.progress.cost_usd + 0.1)
            began = msgspec.structs.replace(each, history=history, progress=progress)
            begin = time.thread_time()
            store.save(IndexedTask(began, 2))
            updates.append(time.thread_time() - begin)
            store.save(IndexedTask(each, 1))
    for name, seconds in (("insert", sorted(inserts)), ("update", sorted(updates))):
        middle, late = seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]
        print(f"{name}: CPU time p50 {middle * 1e6:,.0f} us, p99 {late * 1e6:,.0f} us, max {seconds[-1] * 1e3:,.1f} ms")
    return store


def measure(name: str, query: Callable[[], object]) -> None:
    """Print p50 and p99 of many calls, and p99 of their CPU time, which does not depend on the machine's load."""
    seconds, work_seconds = [], []
    for _ in range(ROUNDS):
        begin, work_begin = time.perf_counter(), time.thread_time()
        query()
        seconds.append(time.perf_counter() - begin)
        work_seconds.append(time.thread_time() - work_begin)
    seconds.sort()
    work_seconds.sort()
    middle, late = ROUNDS // 2, ROUNDS * 99 // 100
    wall = f"p50 {seconds[middle] * 1000:7.2f} ms   p99 {seconds[late] * 1000:7.2f} ms"
    print(f"{name:34} {wall}   CPU time p99 {work_seconds[late] * 1000:7.2f} ms")


def measure_searches(store: SqliteStore, count: int) -> None:
    """Measure searches for words that all, many, few or no tasks contain, with filters, and in other orders."""
    failed, completed = frozenset({TaskState.FAILED}), frozenset({TaskState.COMPLETED})
    middle, end = START_TIME + timedelta(minutes=count // 2), START_TIME + timedelta(minutes=count // 2 + 500)
    queries = {
        "word of all": TaskQuery(search="fix"),
        "word of half": TaskQuery(search="half"),
        "word of a tenth": TaskQuery(search="tenth"),
        "word of a thousandth": TaskQuery(search="thousandth"),
        "word of none": TaskQuery(search="nowhere"),
        "one letter": TaskQuery(search="f"),
        "id": TaskQuery(search=f"task-{count // 2:06}"),
        "six words": TaskQuery(search="failing test explain paragraph why half"),
        "word of all, failed": TaskQuery(failed, search="fix"),
        "word of half, completed": TaskQuery(completed, search="half"),
        "word of half, failed": TaskQuery(failed, search="half"),
        "word of half, label of a tenth": TaskQuery(labels={"team": "team-4"}, search="half"),
        "word of half, repository": TaskQuery(search="half", repository="team-3/repository"),
        "word of half, period": TaskQuery(search="half", created_after=middle),
        "word of all, by name": TaskQuery(search="fix", sort="name", order="asc"),
        "word of half, by name": TaskQuery(search="half", sort="name", order="asc"),
        "word of half, by start": TaskQuery(search="half", sort="started_at"),
        "word of all, by cost": TaskQuery(search="fix", sort="cost"),
        "word of half, by cost": TaskQuery(search="half", sort="cost"),
        "word of half, offset": TaskQuery(search="half", offset=count // 4),
        "repository": TaskQuery(repository="team-3/repository"),
        "repository, failed, label": TaskQuery(failed, {"all": "yes"}, repository="team-3/repository"),
        "half of the period": TaskQuery(created_after=middle),
        "short period": TaskQuery(created_after=middle, created_before=end),
        "short period, by name": TaskQuery(created_after=middle, created_before=end, sort="name"),
        "half of the period, by change": TaskQuery(created_after=middle, sort="state_changed_at"),
        "half of the period, failed": TaskQuery(failed, created_after=middle),
    }
    for name, query in queries.items():
        measure(name, partial(store.query, query))
    deep = store.query(TaskQuery(search="half", limit=1, offset=count // 4)).next_cursor
    measure("word of half, cursor deep", lambda: store.query(TaskQuery(search="half", cursor=deep)))


def measure_totals(store: SqliteStore, count: int) -> None:
    """Measure lists with totals, which add up the costs of all matching tasks."""
    failed, middle = frozenset({TaskState.FAILED}), START_TIME + timedelta(minutes=count // 2)
    queries = {
        "totals": TaskQuery(with_totals=True),
        "totals, by cost": TaskQuery(sort="cost", with_totals=True),
        "totals, failed": TaskQuery(failed, with_totals=True),
        "totals, half of the period": TaskQuery(created_after=middle, with_totals=True),
        "totals, half of the period, failed": TaskQuery(failed, created_after=middle, with_totals=True),
        "totals, label of a tenth": TaskQuery(labels={"team": "team-4"}, with_totals=True),
        "totals, word of half": TaskQuery(search="half", with_totals=True),
        "totals, word of all": TaskQuery(search="fix", with_totals=True),
        "totals, word of half, period": TaskQuery(search="half", created_after=middle, with_totals=True),
    }
    for name, query in queries.items():
        measure(name, partial(store.query, query))


def measure_upgrade(path: Path, count: int) -> None:
    """Print how long the store takes to start if it adds all tasks of an earlier version to the full-text index."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "UPDATE tasks SET number = NULL; DELETE FROM searchable; INSERT INTO search (search) VALUES ('delete-all');"
        )
    begin, begin_work = time.perf_counter(), time.thread_time()
    SqliteStore(path).close()
    seconds, work_seconds = time.perf_counter() - begin, time.thread_time() - begin_work
    print(f"upgrade: {seconds:.1f} s for {count:,} tasks, CPU time {work_seconds:.1f} s")


def main() -> None:
    """Fill a store, measure, and print the results."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "index.sqlite")
        store = fill(path, count)
        store.close()
        print(f"{count:,} tasks, {path.stat().st_size / count:,.0f} bytes per task")
        store = SqliteStore(path)
        rng = random.Random(1)
        measure("plain", lambda: store.query(TaskQuery()))
        for sort in SORTS:
            deep = store.query(TaskQuery(sort=sort, limit=1, offset=count // 2)).next_cursor
            measure(f"cursor deep, {sort}", partial(store.query, TaskQuery(sort=sort, cursor=deep)))
        measure("offset, any", lambda: store.query(TaskQuery(offset=rng.randrange(count))))
        for states in (
            {TaskState.RUNNING},
            {TaskState.FAILED},
            {TaskState.COMPLETED},
            {TaskState.FAILED, TaskState.RUNNING},
        ):
            measure(f"state {' or '.join(sorted(states))}", partial(store.query, TaskQuery(states=frozenset(states))))
        by_name = TaskQuery(states=frozenset({TaskState.FAILED}), sort="name", order="asc")
        measure("state failed, by name", lambda: store.query(by_name))
        measure("label of two", lambda: store.query(TaskQuery(labels={"ticket": str(rng.randrange(count // 2))})))
        measure("label of a tenth", lambda: store.query(TaskQuery(labels={"team": "team-3"})))
        measure("label of all", lambda: store.query(TaskQuery(labels={"all": "yes"})))
        measure("two labels", lambda: store.query(TaskQuery(labels={"all": "yes", "team": "team-3"})))
        failed = frozenset({TaskState.FAILED})
        measure("label of a tenth, failed", lambda: store.query(TaskQuery(failed, {"team": "team-3"})))
        measure("label of a tenth, by name", lambda: store.query(TaskQuery(labels={"team": "team-3"}, sort="name")))
        deep = store.query(TaskQuery(labels={"team": "team-3"}, limit=1, offset=count // 20)).next_cursor
        measure("label of a tenth, cursor deep", lambda: store.query(TaskQuery(labels={"team": "team-3"}, cursor=deep)))
        measure("counts by state", store.count_by_state)
        measure_searches(store, count)
        measure_totals(store, count)
        store.close()
        measure_upgrade(path, count)


if __name__ == "__main__":
    main()
