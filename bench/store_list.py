"""Measures list queries on a store with many tasks: p50 and p99 of each kind of page, and the size per task.

Run: python bench/store_list.py [TASKS]    (default: 100000)
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from sandbox.interfaces.store import IndexedTask, TaskQuery
from sandbox.model.events import Progress
from sandbox.model.manifest.schema import AgentSection, Manifest, Metadata, Repository
from sandbox.model.task import Attempt, StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

ROUNDS = 200
SORTS: tuple[Literal["created_at", "started_at", "state_changed_at", "name"], ...] = (
    "created_at",
    "started_at",
    "state_changed_at",
    "name",
)
LIFE = (TaskState.PENDING, TaskState.STAGING, TaskState.PROVISIONING, TaskState.READY, TaskState.RUNNING)
STATES = [TaskState.COMPLETED] * 90 + [TaskState.FAILED] * 8 + [TaskState.CANCELLED] * 2
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def task(number: int) -> Task:
    """Create a task. Nearly all are finished; one in 10,000 is running."""
    state = STATES[number % len(STATES)] if number % 10_000 else TaskState.RUNNING
    at = BEGIN + timedelta(seconds=60 * number)
    labels = {"team": f"team-{number % 10}", "ticket": str(number // 2), "all": "yes"}
    manifest = Manifest(
        metadata=Metadata(name=f"task {number % 1000}", id=f"task-{number:06}", labels=labels),
        repository=Repository(url="https://git.example.org/team/repository.git", branch="main"),
        agent=AgentSection(
            "claude",
            {
                "prompt": "Fix the failing test, and explain in one paragraph why it failed. " * 8,
                "model": "claude-sonnet-4-5-20250929",
            },
        ),
    )
    states = LIFE[:1] if state is TaskState.CANCELLED else LIFE
    history = [StateHistoryEntry(entered, at + timedelta(seconds=index)) for index, entered in enumerate(states)]
    if state is not history[-1].state:
        history.append(StateHistoryEntry(state, at + timedelta(seconds=500 + number % 997)))
    attempt = Attempt("abcdefghijkl", "bubblewrap", "host", "sandbox-abcdefghijkl", "bubblewrap", "host", "c" * 40, "s")
    progress = Progress(10_000, 20, None, at, 12, 100_000, 5_000, 0.25)
    return Task(f"task-{number:06}", manifest, state, "It is", tuple(history), 500, attempt, progress=progress)


def fill(path: Path, count: int) -> SqliteStore:
    """Create a store with `count` tasks, without fsync, which is not measured here."""
    store = SqliteStore(path)
    store._connections.writer.execute("PRAGMA synchronous = OFF")
    for number in range(count):
        store.insert(IndexedTask(task(number), 1))
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
        store.close()


if __name__ == "__main__":
    main()
