"""Records the examples of `openapi.json` and `docs/rest-reference.md`.

The examples are the requests that the test modules of the routes declare, and the app's responses.

The app serves tasks from memory, at a fixed time. The examples are therefore real responses, and are the same in every
run.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute

from doubles.example_requests import (
    COMPLETED_EVENTS,
    FAILED_EVENTS,
    MANIFEST,
    PATCH,
    PATCH_ARTIFACT,
    RUNNING_EVENTS,
    TASK,
    Example,
)
from doubles.fake_tasks import FakeTasks
from doubles.fake_token_store import FakeTokenStore
from doubles.in_process_api import Api
from doubles.manifests import parse_manifest
from sandbox import __version__
from sandbox.agents import registered_agents
from sandbox.api.app import create_api_schema_app
from sandbox.api.errors import RequestTimeoutError
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.server_services import (
    Health,
    Inheritance,
    InsufficientResourcesError,
    Occupancy,
    UnavailableError,
)
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.fixed_limits import BODY_BYTES_MAX
from sandbox.model.task_state import TaskState

REQUEST_ID = "a33554409af24c8c89ac10ee89963307"
ROOT = Path(__file__).parents[2]
ROUTE_TESTS = ROOT / "tests" / "unit" / "api" / "routes"
"""The test modules that declare the examples of their routes."""

_GIBIBYTE = 1024**3


def api_routes() -> list[APIRoute]:
    """Return the routes of all operations, in the order in which the documentation lists them."""
    routes = create_api_schema_app(__version__, registered_agents(), {}).routes
    return [route for route in routes if isinstance(route, APIRoute) and route.include_in_schema]


def declared_examples() -> list[Example]:
    """Return the examples that the test modules of the routes declare."""
    modules = [import_module(f"unit.api.routes.{path.stem}") for path in sorted(ROUTE_TESTS.glob("test_*.py"))]
    return [example for module in modules for example in getattr(module, "EXAMPLES", ())]


def match_examples(routes: Sequence[APIRoute], examples: Sequence[Example]) -> list[tuple[APIRoute, Example]]:
    """Return each route with its example. Raises AssertionError unless each operation has exactly one."""
    counts = Counter(example.operation for example in examples)
    errors = [
        f"{route.operation_id}: declare one Example in EXAMPLES of {_test_module(route)}, not {count}"
        for route in routes
        if (count := counts.pop(str(route.operation_id), 0)) != 1
    ]
    errors += [f"{operation}: the Example has an unknown operation" for operation in counts]
    assert not errors, "\n".join(errors)
    by_operation = {example.operation: example for example in examples}
    return [(route, by_operation[str(route.operation_id)]) for route in routes]


def record_examples() -> dict[str, Any]:
    """Return the requests and responses, keyed by operation, and the error bodies, keyed by error code."""
    matched = match_examples(api_routes(), declared_examples())
    operations = {example.operation: _record(route, example) for route, example in matched}
    return {"operations": operations, "errors": {body["error"]: body for body in _error_bodies()}}


def record_failed_status() -> dict[str, Any]:
    """Return the status of a task whose agent failed."""
    with tempfile.TemporaryDirectory() as directory:
        tasks = FakeTasks()
        tasks.event_interval = timedelta(seconds=1.5)
        _add_task(tasks, Path(directory), *FAILED_EVENTS)
        response = Api(tasks).get(f"/api/v1/tasks/{TASK}")
    assert response.status_code == 200, response.text
    status: dict[str, Any] = response.json()
    return status


def _test_module(route: APIRoute) -> str:
    name = route.endpoint.__module__.rpartition(".")[2]
    return f"{ROUTE_TESTS.relative_to(ROOT)}/test_{name}.py"


def _record(route: APIRoute, example: Example) -> dict[str, Any]:
    [method] = route.methods
    values = {"task_id": TASK, **example.path_params}
    request = {
        "method": method,
        "path": route.path_format,
        "path_params": {name: values[name] for name in route.param_convertors},
        "query": dict(example.query),
        "headers": dict(example.headers),
        "body": example.body,
    }
    with tempfile.TemporaryDirectory() as directory:
        tasks = _prepare(Path(directory), example.events)
        if example.is_sandbox_preserved:
            tasks.preserved.add(TASK)
        response = _send(Api(tasks), request)
    assert response.status_code < 300, (example, response.text)
    media_type = response.headers.get("content-type", "").partition(";")[0]
    body = response.json() if media_type == "application/json" else response.text
    if example.shown_lines_contain:
        body = "".join(line for line in body.splitlines(keepends=True) if example.shown_lines_contain in line)
    return {"request": request, "response": {"status": response.status_code, "media_type": media_type, "body": body}}


def _send(api: Api, request: Mapping[str, Any]) -> Any:
    path = request["path"].format(**request["path_params"])
    headers = {"X-Request-Id": REQUEST_ID, **request["headers"]}
    content = None if request["body"] is None else json.dumps(request["body"])
    if content is not None:
        headers["Content-Type"] = "application/json"
    return api(request["method"], path, params=request["query"], headers=headers, content=content)


def _prepare(directory: Path, events: Sequence[e.Event] | None = COMPLETED_EVENTS) -> FakeTasks:
    """Return a server with a task that has these events, or without a task if `events` is None."""
    tasks = FakeTasks()
    tasks.event_interval = timedelta(seconds=1.5)
    tasks.health_report = _health()
    if events is not None:
        _add_task(tasks, directory, *events)
    return tasks


def _add_task(tasks: FakeTasks, directory: Path, *events: e.Event) -> None:
    manifest = parse_manifest(json.dumps(MANIFEST).encode(), is_json=True)
    tasks.record(TASK, e.TaskSubmitted(TASK, manifest), *events)
    for artifact in (each.artifact for each in events if isinstance(each, e.ArtifactCollected)):
        file = directory / artifact.name
        file.write_text(PATCH)
        tasks.add_artifact(TASK, artifact, file)
    tasks.inheritances[TASK] = Inheritance(e.Parent(TASK, "0" * 40, (PATCH_ARTIFACT,)), {})


def _health() -> Health:
    probe = RuntimeProbe(
        "gvisor",
        is_available=True,
        tier="gvisor",
        strength=20,
        isolation_notes=("a kernel in user space",),
        enforced_limits=frozenset({"memory", "cpus", "processes"}),
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
    tasks = _prepare(directory)
    api = Api(tasks)

    def get(path: str, **options: Any) -> dict[str, Any]:
        return _error_body(api, "GET", path, **options)

    yield get("/api/v1/tasks?sort=nam&limit=5000")
    yield get("/api/v1/tasks/fix-test")
    yield get(f"/api/v1/tasks/{TASK}/artifacts/report.xml")
    yield get(f"/api/v1/tasks/{TASK}/artifacts/{TASK}.patch", headers={"Range": "bytes=5000-"})
    yield _error_body(api, "POST", "/api/v1/hosts/build-2/drain")
    yield _error_body(api, "DELETE", f"/api/v1/tasks/{TASK}/vm")
    yield _error_body(api, "DELETE", f"/api/v1/tasks/{TASK}")
    tasks.inheritances.clear()
    yield _error_body(api, "POST", f"/api/v1/tasks/{TASK}/continue", json={"prompt": "Add a test for it."})
    running = FakeTasks()
    _add_task(running, directory, *RUNNING_EVENTS)
    yield _error_body(Api(running), "POST", f"/api/v1/tasks/{TASK}/continue", json={"prompt": "Add a test for it."})


def _errors_of_submissions(directory: Path) -> Iterator[dict[str, Any]]:
    tasks = _prepare(directory)
    api = Api(tasks)

    def submit(**options: Any) -> dict[str, Any]:
        return _error_body(api, "POST", "/api/v1/tasks", **options)

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
    tasks = _prepare(directory)
    leaked = Artifact("log.txt", "log.txt", len(PATCH), "text/plain", "sha256:0", contains_secret=True)
    tasks.add_artifact(TASK, leaked, directory / "log.txt")
    api = Api(tasks, FakeTokenStore(olga="operator", vera="viewer"), requests_per_minute=3, monotonic=lambda: 0.0)
    viewer = {"Authorization": "Bearer vera"}
    yield _error_body(api, "GET", "/api/v1/tasks")
    yield _error_body(api, "POST", "/api/v1/tasks", headers=viewer)
    yield _error_body(api, "GET", f"/api/v1/tasks/{TASK}/artifacts/log.txt", headers=viewer)
    yield _error_body(api, "POST", "/api/v1/tasks", headers=viewer)
    yield _error_body(api, "GET", "/api/v1/tasks", headers=viewer)


def _error_body(api: Api, method: str, path: str, **options: Any) -> dict[str, Any]:
    headers = {"X-Request-Id": REQUEST_ID, **options.pop("headers", {})}
    response = api(method, path, headers=headers, **options)
    assert response.status_code >= 400, (method, path, response.text)
    body: dict[str, Any] = response.json()
    return body
