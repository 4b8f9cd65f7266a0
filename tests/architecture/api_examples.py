"""Records the examples of `openapi.json` and `docs/rest.md`: requests to the app, and its responses.

The app serves tasks in memory, at a fixed time. So the examples are responses of the code, and do not differ between
two runs.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import FakeTasks
from doubles.in_process_api import Api
from doubles.manifests import parse_manifest
from sandbox.api.errors import RequestTimeoutError
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.tasks import (
    Health,
    Inheritance,
    InsufficientResourcesError,
    Occupancy,
    UnavailableError,
)
from sandbox.model import events as e
from sandbox.model.fixed_limits import BODY_BYTES_MAX
from sandbox.model.task_state import TaskState

TASK = "fix-tests"
MANIFEST: dict[str, Any] = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "Fix the tests", "id": TASK, "labels": {"team": "platform"}},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Fix the failing tests."},
}
PATCH = """\
diff --git a/src/parser.py b/src/parser.py
index 3f0a1c2..9b1d4e7 100644
--- a/src/parser.py
+++ b/src/parser.py
@@ -1,2 +1,4 @@
 def parse(tokens):
+    if not tokens:
+        return []
     return tokens[0]
"""
REQUEST_ID = "a33554409af24c8c89ac10ee89963307"
_GIBIBYTE = 1024**3


@dataclass(frozen=True)
class Example:
    """A request. path_params and query: the values of its parameters, by name. body: JSON."""

    operation: str
    method: str
    path: str
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None


_ID = {"task_id": TASK}

EXAMPLES = (
    Example(
        "list_tasks",
        "GET",
        "/api/v1/tasks",
        query={"state": "completed,failed", "label.team": "platform", "limit": "50"},
    ),
    Example("submit_task", "POST", "/api/v1/tasks", headers={"Idempotency-Key": "build-4711"}, body=MANIFEST),
    Example("get_task", "GET", "/api/v1/tasks/{task_id}", _ID),
    Example("wait_for_task", "GET", "/api/v1/tasks/{task_id}/wait", _ID, query={"timeout": "60"}),
    Example("cancel_task", "DELETE", "/api/v1/tasks/{task_id}", _ID, query={"reason": "Not needed"}),
    Example("release_sandbox", "DELETE", "/api/v1/tasks/{task_id}/vm", _ID),
    Example("delete_task", "DELETE", "/api/v1/tasks/{task_id}/data", _ID),
    Example(
        "rerun_task",
        "POST",
        "/api/v1/tasks/{task_id}/rerun",
        _ID,
        body={"overrides": ["vm.cpus=8", f"metadata.id={TASK}-2"]},
    ),
    Example(
        "continue_task",
        "POST",
        "/api/v1/tasks/{task_id}/continue",
        _ID,
        body={"prompt": "Add a test for it.", "overrides": [f"metadata.id={TASK}-2"]},
    ),
    Example("get_logs", "GET", "/api/v1/tasks/{task_id}/logs", _ID, query={"stream": "events", "tail": "3"}),
    Example("get_events", "GET", "/api/v1/events", query={"after": "0-0"}),
    Example("list_artifacts", "GET", "/api/v1/tasks/{task_id}/artifacts", _ID),
    Example(
        "download_artifact",
        "GET",
        "/api/v1/tasks/{task_id}/artifacts/{name}",
        {**_ID, "name": f"{TASK}.patch"},
    ),
    Example("get_basic_health", "GET", "/api/health"),
    Example("get_liveness", "GET", "/api/v1/health/live"),
    Example("get_health", "GET", "/api/v1/health"),
    Example("get_readiness", "GET", "/api/v1/health/ready"),
    Example("get_metrics", "GET", "/metrics"),
    Example("get_drain", "GET", "/api/v1/admin/drain"),
    Example("begin_drain", "POST", "/api/v1/admin/drain"),
    Example("undo_drain", "DELETE", "/api/v1/admin/drain"),
    Example("prune_tasks", "POST", "/api/v1/admin/prune", query={"older_than_seconds": "604800", "dry_run": "true"}),
    Example("open_session", "POST", "/api/v1/session"),
    Example("close_session", "DELETE", "/api/v1/session"),
)
"""One request for each operation, in the order of the documentation."""


def record_examples() -> dict[str, Any]:
    """Return the requests and responses by operation, and the body of each error by its code."""
    operations = {example.operation: _record(example) for example in EXAMPLES}
    return {"operations": operations, "errors": {body["error"]: body for body in _error_bodies()}}


def record_failed_status() -> dict[str, Any]:
    """Return the status of a task whose agent failed."""
    with tempfile.TemporaryDirectory() as directory:
        tasks = FakeTasks()
        tasks.event_interval = timedelta(seconds=1.5)
        _add_task(tasks, Path(directory), *_EVENTS_TO_FAILED)
        response = Api(tasks).get(f"/api/v1/tasks/{TASK}")
    assert response.status_code == 200, response.text
    status: dict[str, Any] = response.json()
    return status


def _record(example: Example) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        tasks = _prepare(example.operation, Path(directory))
        response = _send(Api(tasks), example)
    assert response.status_code < 300, (example, response.text)
    media_type = response.headers.get("content-type", "").partition(";")[0]
    body = response.json() if media_type == "application/json" else response.text
    if example.operation == "get_metrics":
        body = "".join(line for line in body.splitlines(keepends=True) if "sandbox_tasks" in line)
    request = {
        "method": example.method,
        "path": example.path,
        "path_params": dict(example.path_params),
        "query": dict(example.query),
        "headers": dict(example.headers),
        "body": example.body,
    }
    return {"request": request, "response": {"status": response.status_code, "media_type": media_type, "body": body}}


def _send(api: Api, example: Example, **options: Any) -> Any:
    path = example.path.format(**example.path_params)
    headers = {"X-Request-Id": REQUEST_ID, **example.headers}
    content = None if example.body is None else json.dumps(example.body)
    if content is not None:
        headers["Content-Type"] = "application/json"
    return api(example.method, path, params=dict(example.query), headers=headers, content=content, **options)


def _prepare(operation: str, directory: Path) -> FakeTasks:
    """Return a server with a task in the state that the operation requires."""
    tasks = FakeTasks()
    tasks.event_interval = timedelta(seconds=1.5)
    tasks.health_report = _health()
    if operation == "submit_task":
        return tasks
    events = _EVENTS_TO_RUNNING if operation == "cancel_task" else _EVENTS
    if operation == "release_sandbox":
        events = _EVENTS_TO_PRESERVED
        tasks.preserved.add(TASK)
    _add_task(tasks, directory, *events)
    return tasks


def _add_task(tasks: FakeTasks, directory: Path, *events: e.Event) -> None:
    manifest = parse_manifest(json.dumps(MANIFEST).encode(), is_json=True)
    tasks.record(TASK, e.TaskSubmitted(TASK, manifest), *events)
    for artifact in (each.artifact for each in events if isinstance(each, e.ArtifactCollected)):
        file = directory / artifact.name
        file.write_text(PATCH)
        tasks.add_artifact(TASK, artifact, file)
    tasks.inheritances[TASK] = Inheritance(e.Parent(TASK, "0" * 40, (_PATCH_ARTIFACT,)), {})


_PATCH_ARTIFACT = e.Artifact(
    f"{TASK}.patch",
    f".sandbox/{TASK}.patch",
    len(PATCH),
    "text/x-diff",
    f"sha256:{hashlib.sha256(PATCH.encode()).hexdigest()}",
)
_EVENTS_TO_RUNNING: tuple[e.Event, ...] = (
    e.AttemptStarted("vcsbstbezmsq", "gvisor", "here"),
    e.WorkspacePrepared("9fceb02d0ae598e95dc970b74767f19372d61af8"),
    e.SandboxCreated("sandbox-vcsbstbezmsq", "gvisor", "host"),
    e.AgentStarted("00000000-0000-0000-0000-000000000000", agent="Claude Code"),
    e.Progress(output_bytes=5210, tool_calls=5, turns=6, input_tokens=52_800, output_tokens=700, cost_usd=0.10626),
)
_EVENTS: tuple[e.Event, ...] = (
    *_EVENTS_TO_RUNNING,
    e.AgentExited(0, {"is_error": False, "num_turns": 6, "result": "The tests pass."}),
    e.ArtifactCollected(_PATCH_ARTIFACT, e.DiffStatistics(1, 2, 0)),
    e.TaskFinished(),
)
_EVENTS_TO_FAILED: tuple[e.Event, ...] = (
    *_EVENTS_TO_RUNNING,
    e.AgentExited(1, failure=e.Failure("agent_failed", "Claude Code exited with 1.")),
    e.TaskFinished(),
)
_EVENTS_TO_PRESERVED = _EVENTS_TO_FAILED


def _health() -> Health:
    probe = RuntimeProbe(
        "gvisor",
        is_available=True,
        tier="gvisor",
        strength=20,
        isolates=("a kernel in user space",),
        limits=frozenset({"memory", "cpus", "processes"}),
    )
    occupancy = Occupancy(16, 4, 64 * _GIBIBYTE, 8 * _GIBIBYTE, 500 * _GIBIBYTE, 40 * _GIBIBYTE, 0)
    return Health(
        "0.1.0",
        86_400.0,
        {TaskState.RUNNING: 1, TaskState.COMPLETED: 12},
        [probe],
        is_store_ok=True,
        disk_free_bytes=400 * _GIBIBYTE,
        disk_total_bytes=500 * _GIBIBYTE,
        is_ready=True,
        occupancy=occupancy,
    )


def _error_bodies() -> Iterator[dict[str, Any]]:
    """Yield one response for each error code."""
    with tempfile.TemporaryDirectory() as directory:
        yield from _errors_of_tasks(Path(directory))
        yield from _errors_of_submissions(Path(directory))
        yield from _errors_of_access(Path(directory))


def _errors_of_tasks(directory: Path) -> Iterator[dict[str, Any]]:
    tasks = _prepare("", directory)
    api = Api(tasks)

    def get(path: str, **options: Any) -> dict[str, Any]:
        return _fail(api, "GET", path, **options)

    yield get("/api/v1/tasks?sort=nam&limit=5000")
    yield get("/api/v1/tasks/fix-test")
    yield get(f"/api/v1/tasks/{TASK}/artifacts/report.xml")
    yield get(f"/api/v1/tasks/{TASK}/artifacts/{TASK}.patch", headers={"Range": "bytes=5000-"})
    yield _fail(api, "DELETE", f"/api/v1/tasks/{TASK}/vm")
    yield _fail(api, "DELETE", f"/api/v1/tasks/{TASK}")
    tasks.inheritances.clear()
    yield _fail(api, "POST", f"/api/v1/tasks/{TASK}/continue", json={"prompt": "Add a test for it."})
    running = FakeTasks()
    _add_task(running, directory, *_EVENTS_TO_RUNNING)
    yield _fail(Api(running), "POST", f"/api/v1/tasks/{TASK}/continue", json={"prompt": "Add a test for it."})


def _errors_of_submissions(directory: Path) -> Iterator[dict[str, Any]]:
    tasks = _prepare("", directory)
    api = Api(tasks)

    def submit(**options: Any) -> dict[str, Any]:
        return _fail(api, "POST", "/api/v1/tasks", **options)

    wrong = {**MANIFEST, "vm": {"memry": "8G", "network_mode": "isolatd"}}
    yield submit(json=wrong)
    yield submit(json=MANIFEST)
    yield submit(content=b" " * (BODY_BYTES_MAX + 1))
    key = {"Idempotency-Key": "build-4711"}
    accepted = api.post("/api/v1/tasks", json={**MANIFEST, "metadata": {"name": "Another task"}}, headers=key)
    assert accepted.status_code == 202, accepted.text
    yield submit(json=MANIFEST, headers=key)
    resources = {"requested_cpus": 64, "requested_memory_bytes": 8 * _GIBIBYTE}
    capacity = {"available_cpus": 16, "available_memory_bytes": 64 * _GIBIBYTE}
    for failure in (
        RequestTimeoutError.after(30),
        UnavailableError("The server is draining.", retry_after_seconds=30),
        InsufficientResourcesError(["64 CPUs (16 are available)"], **resources, **capacity),
        ValueError(),
    ):
        tasks.failure = failure
        yield submit(json={**MANIFEST, "metadata": {"name": "Another task"}})


def _errors_of_access(directory: Path) -> Iterator[dict[str, Any]]:
    tasks = _prepare("", directory)
    leaked = e.Artifact("log.txt", "log.txt", len(PATCH), "text/plain", "sha256:0", contains_secret=True)
    tasks.add_artifact(TASK, leaked, directory / "log.txt")
    api = Api(tasks, FakeAccess(olga="operator", vera="viewer"), requests_per_minute=3, monotonic=lambda: 0.0)
    viewer = {"Authorization": "Bearer vera"}
    yield _fail(api, "GET", "/api/v1/tasks")
    yield _fail(api, "POST", "/api/v1/tasks", headers=viewer)
    yield _fail(api, "GET", f"/api/v1/tasks/{TASK}/artifacts/log.txt", headers=viewer)
    yield _fail(api, "POST", "/api/v1/tasks", headers=viewer)
    yield _fail(api, "GET", "/api/v1/tasks", headers=viewer)


def _fail(api: Api, method: str, path: str, **options: Any) -> dict[str, Any]:
    headers = {"X-Request-Id": REQUEST_ID, **options.pop("headers", {})}
    response = api(method, path, headers=headers, **options)
    assert response.status_code >= 400, (method, path, response.text)
    body: dict[str, Any] = response.json()
    return body
