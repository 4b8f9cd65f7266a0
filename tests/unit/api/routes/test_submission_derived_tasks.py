"""Tasks that are created from an earlier task."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest

from doubles.example_requests import TASK, Example
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.request_parsing import parse_json_body
from sandbox.api.routes import submission
from sandbox.api.routes import tasks as tasks_routes
from sandbox.interfaces.server_services import Inheritance
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.fixed_limits import BODY_BYTES_MAX
from sandbox.model.manifest.schema import Secret

EXAMPLES = (
    Example("rerun_task", body={"overrides": ["vm.cpus=8", f"metadata.id={TASK}-2"]}),
    Example("continue_task", body={"prompt": "Add a test for it.", "overrides": [f"metadata.id={TASK}-2"]}),
)

RERUN = "/api/v1/tasks/task-001/rerun"


def rerun(api, **options):
    response = api.post(RERUN, **options)
    assert response.status_code == 202, response.text
    return api.tasks.entries[response.json()["task_id"]].task.manifest


@pytest.mark.parametrize("events", [(), TO_RUNNING, (*TO_RUNNING, *TO_COMPLETED)], ids=["new", "running", "ended"])
def test_rerun_submits_the_same_manifest_under_another_id(api, tasks, events):
    secret = Secret(name="TOKEN", source="env", key="MY_TOKEN")
    earlier = tasks.add("task-001", *events, labels={"team": "platform"})
    tasks.entries["task-001"].task = earlier = replace_manifest(earlier, secrets=(secret,))
    response = api.post(RERUN)
    new = tasks.entries[response.json()["task_id"]].task
    assert response.headers["location"] == f"/api/v1/tasks/{new.id}"
    assert new.id != "task-001"
    assert new.manifest.replace(metadata=earlier.manifest.metadata) == earlier.manifest
    assert new.manifest.metadata.labels == {"team": "platform"}
    assert new.manifest.secrets == (secret,)
    assert tasks.entries["task-001"].task == earlier
    assert (new.rerun_of, new.parent, earlier.rerun_of) == ("task-001", None, None)
    assert api.get(f"/api/v1/tasks/{new.id}").json()["rerun_of"] == "task-001"


@pytest.mark.parametrize(
    ("module", "method", "path"),
    [
        (submission, "POST", RERUN),
        (submission, "POST", "/api/v1/tasks/task-001/continue"),
        (tasks_routes, "DELETE", "/api/v1/tasks/task-001"),
    ],
)
def test_body_is_parsed_outside_of_the_event_loop(api, tasks, monkeypatch, module, method, path):
    """A large body with many errors takes 0.1 s to parse."""

    def parse(*arguments):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        parsed.append(path)
        return parse_json_body(*arguments)

    parsed = []
    tasks.add("task-001", *TO_RUNNING, *(TO_COMPLETED if "continue" in path else ()))
    monkeypatch.setattr(module, "parse_json_body", parse)
    response = api(method, path, json={} if method == "DELETE" else {"prompt": "Again."})
    assert parsed == [path], response.text


def replace_manifest(task, **changes):
    return msgspec.structs.replace(task, manifest=task.manifest.replace(**changes))


def test_overrides_and_prompt_change_the_new_task_only(api, tasks):
    tasks.add("task-001")
    body = {
        "overrides": ["vm.cpus=8", "vm.cpus=16", "metadata.id=task-002", "secrets[0].name=A"],
        "prompt": "Another prompt",
    }
    body["overrides"] += ["secrets[0].source=env", "secrets[0].key='1'"]
    manifest = rerun(api, json=body)
    assert (manifest.vm.cpus, manifest.metadata.id, manifest.agent.prompt) == (16, "task-002", "Another prompt")
    assert [(secret.name, secret.key) for secret in manifest.secrets] == [("A", "1")]
    assert tasks.entries["task-001"].task.manifest.vm.cpus == 4


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"overrides": ["vm.cpus"]}, "invalid_parameter", "overrides[0]"),
        ({"overrides": ["vm.cpus=1", "=5"]}, "invalid_parameter", "overrides[1]"),
        ({"overrides": ["secrets[7].name=A"]}, "invalid_parameter", "overrides[0]"),
        ({"overrides": ["vm.cpus=1"] * 257}, "invalid_parameter", "overrides"),
        ({"overrides": [".".join(["a"] * 400_000) + "=1"]}, "invalid_parameter", "overrides[0]"),
        ({"overrides": ["vm.cpus=many"]}, "invalid_manifest", "vm.cpus"),
        ({"overrides": ["claude=5"]}, "invalid_manifest", "claude"),
        ({"overrides": ["metadata.id=../x"]}, "invalid_manifest", "metadata.id"),
        ({"overrides": ["vm.profile=absent"]}, "invalid_manifest", "vm.profile"),
        ({"prompt": ""}, "invalid_parameter", "prompt"),
        ({"prompt": "\0"}, "invalid_parameter", "prompt"),
        ({"prompt": 5}, "invalid_parameter", "prompt"),
        ({"promt": "x"}, "invalid_parameter", "promt"),
        ([], "invalid_parameter", ""),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_invalid_change_is_rejected_and_submits_nothing(api_with_tokens, tasks, body, code, field):
    api = api_with_tokens(FakeTokenStore(), list_profiles=lambda: {"agentic-dev": ""})
    tasks.add("task-001")
    response = api.post(RERUN, json=body)
    assert (response.status_code, response.json()["error"]) == (400, code)
    assert response.json()["details"][0]["field"] == field
    assert list(tasks.entries) == ["task-001"]


@pytest.mark.parametrize("content", [b"{", b'{"prompt": "\\ud800"}', b"[" * 100_000, b"\xff"])
def test_unreadable_body_is_rejected(api, tasks, content):
    tasks.add("task-001")
    response = api.post(RERUN, content=content)
    assert (response.status_code, response.json()["error"]) in [(400, "invalid_parameter"), (400, "invalid_manifest")]
    assert list(tasks.entries) == ["task-001"]


def test_unknown_task_returns_404(api, tasks):
    response = api.post(RERUN)
    assert (response.status_code, response.json()["error"]) == (404, "task_not_found")


def test_rerun_with_an_idempotency_key_can_be_repeated_safely(api, tasks):
    tasks.add("task-001")
    tasks.add("task-002")
    headers = {"Idempotency-Key": "6f1c"}
    first, second = api.post(RERUN, headers=headers), api.post(RERUN, headers=headers)
    assert (first.status_code, second.status_code, first.json()) == (202, 202, second.json())
    assert second.headers["idempotent-replayed"] == "true"
    for path, body in ((RERUN, {"prompt": "x"}), ("/api/v1/tasks/task-002/rerun", None)):
        response = api.post(path, headers=headers, json=body)
        assert (response.status_code, response.json()["error"]) == (422, "idempotency_key_reused")
    assert len(tasks.entries) == 3


def test_memory_is_reserved_for_the_manifest_of_the_earlier_task(api, tasks, monkeypatch):
    reserved = []

    class RecordingShare:
        @asynccontextmanager
        async def reservation(self, size_bytes):
            reserved.append(size_bytes)
            yield

    monkeypatch.setattr("sandbox.api.request_parsing.fair_client_shares.current_memory_share", RecordingShare)
    tasks.add("task-001")
    assert api.post(RERUN, json={"prompt": "x"}).status_code == 202
    assert api.post("/api/v1/tasks", content=b"{").status_code == 400
    of_rerun, of_submission = reserved
    assert of_rerun > 2 * BODY_BYTES_MAX > of_submission


def test_only_operators_may_rerun_a_task(api_with_tokens, tasks):
    tasks.add("task-001")
    api = api_with_tokens(FakeTokenStore(alice="operator", bob="viewer"), clone_hosts=frozenset({"github.com"}))
    codes = [
        api.post(RERUN, headers={"Authorization": f"Bearer {name}"}).status_code for name in ("bob", "nobody", "alice")
    ]
    assert codes == [403, 401, 202]
    unknown = api.post(RERUN.replace("task-001", "absent"), headers={"Authorization": "Bearer bob"})
    assert (unknown.status_code, len(tasks.entries)) == (403, 2)


CONTINUE = "/api/v1/tasks/task-001/continue"


@pytest.fixture
def ended(tasks):
    """A task that has ended and can be continued."""
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    session = Artifact("inherited-agent-session.gz", ".sandbox/x", 1, "application/gzip", "sha256:0")
    parent = e.Parent("task-001", "0" * 40, (), None, "session-1", session)
    tasks.inheritances["task-001"] = Inheritance(parent, {})
    return tasks


def test_continuation_has_the_earlier_task_as_its_parent(api, ended):
    response = api.post(CONTINUE, json={"prompt": "Now the tests.", "overrides": ["metadata.id=task-002"]})
    assert (response.status_code, response.headers["location"]) == (202, "/api/v1/tasks/task-002")
    new = ended.entries["task-002"].task
    assert new.manifest.agent.prompt == "Now the tests."
    assert new.parent == ended.inheritances["task-001"].parent
    for path in ("/api/v1/tasks/task-002", "/api/v1/tasks"):
        body = api.get(path).json()
        status = body if "id" in body else next(one for one in body["tasks"] if one["id"] == "task-002")
        assert (status["parent"], status["continues"]) == ("task-001", "session")
    assert new.rerun_of is None
    assert api.get("/api/v1/tasks/task-001").json()["parent"] is None


@pytest.mark.parametrize(
    ("name", "overrides", "new_name"),
    [
        ("Fix the login", [], "Now the tests"),
        ("Fix…", [], "Now the tests"),
        ("login-fix", [], "login-fix"),
        ("Fix the login", ["metadata.name=mine"], "mine"),
    ],
)
def test_name_derived_from_the_earlier_prompt_is_replaced_by_one_from_the_new_prompt(
    api, ended, name, overrides, new_name
):
    entry = ended.entries["task-001"]
    agent = entry.task.manifest.agent.with_prompt("# Fix the login\nBe quick.")
    metadata = replace(entry.task.manifest.metadata, name=name)
    entry.task = replace_manifest(entry.task, agent=agent, metadata=metadata)
    body = {"prompt": "Now the tests:\nall of them", "overrides": ["metadata.id=task-002", *overrides]}
    assert api.post(CONTINUE, json=body).status_code == 202
    assert ended.entries["task-002"].task.manifest.metadata.name == new_name


def test_status_of_each_task_in_a_chain_has_the_totals_of_the_chain(api, ended):
    alone = api.get("/api/v1/tasks/task-001").json()
    assert alone["chain"] is None
    assert api.post(CONTINUE, json={"prompt": "x", "overrides": ["metadata.id=task-002"]}).status_code == 202
    ended.record("task-002", *TO_RUNNING, e.Progress(cost_usd=0.5), *TO_COMPLETED)
    first, second = (api.get(f"/api/v1/tasks/{task_id}").json() for task_id in ("task-001", "task-002"))
    duration = round(first["duration_seconds"] + second["duration_seconds"], 3)
    assert first["chain"] == second["chain"] == {"tasks": 2, "cost_usd": 0.5, "duration_seconds": duration}
    assert "chain" not in api.get("/api/v1/tasks").json()["tasks"][0]


def test_interactive_continuation_receives_the_conversation_as_text(api, ended):
    body = {"prompt": "Look.", "overrides": ["claude.headless=false", "metadata.id=task-002"]}
    assert api.post(CONTINUE, json=body).status_code == 202
    assert api.get("/api/v1/tasks/task-002").json()["continues"] == "context"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_parameter"),
        ({"prompt": None}, "invalid_parameter"),
        ({"prompt": ""}, "invalid_parameter"),
        ({"prompt": "a\0b"}, "invalid_parameter"),
        ({"prompt": "x" * 600_000}, "invalid_parameter"),
        ({"prompt": "x", "overrides": ["repository.branch=other"]}, "invalid_parameter"),
        ({"prompt": "x", "overrides": ["repository.patch=ZGlmZg=="]}, "invalid_parameter"),
        ({"prompt": "x", "parent": "task-009"}, "invalid_parameter"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_invalid_continuation_is_rejected(api, ended, body, code):
    response = api.post(CONTINUE, json=body)
    assert (response.status_code, response.json()["error"]) == (400, code)
    assert list(ended.entries) == ["task-001"]


def test_rejected_repository_override_of_a_continuation_is_reported_with_its_location(api, ended):
    body = {"prompt": "x", "overrides": ["vm.cpus=2", "repository.branch=dev", "vm.memory=2G"]}
    [detail] = api.post(CONTINUE, json=body).json()["details"]
    assert (detail["location"], detail["field"]) == ("body.overrides[1]", "repository.branch")
    assert detail["message"] == "must not change: the task starts from the work of an earlier task"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (RERUN, {"set": ["vm.cpus=2"]}, "is an unknown field; valid fields: overrides, prompt"),
        (CONTINUE, {"prompt": "x", "zzz": 1}, "is an unknown field; valid fields: prompt, overrides"),
        (RERUN, {"dry_run": True}, "is a query parameter; add ?dry_run=VALUE to the URL"),
        (f"{RERUN}?dry_run=1&x=1", {"dry_run": True}, "is a query parameter; add ?dry_run=VALUE to the URL"),
    ],
)
def test_error_for_an_unknown_body_field_contains_a_remedy(api, ended, path, body, message):
    details = api.post(path, json=body).json()["details"]
    assert message in [each["message"] for each in details if each["location"].startswith("body.")]


@pytest.mark.parametrize("prompt", ["/clear", "--resume x", "</earlier-conversation>", "$(reboot)", "ü\u202e"])
def test_prompt_is_not_interpreted(api, ended, prompt):
    response = api.post(CONTINUE, json={"prompt": prompt})
    assert response.status_code == 202
    assert ended.entries[response.json()["task_id"]].task.manifest.agent.prompt == prompt


def test_task_that_cannot_be_continued_returns_a_conflict(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    response = api.post(CONTINUE, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]) == (409, "task_not_ended")
    assert response.json()["task_state"] == "running"
    tasks.record("task-001", *TO_COMPLETED)
    response = api.post(CONTINUE, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]) == (409, "task_not_continuable")
    assert response.json()["message"] == (
        "Task task-001 cannot be continued: it ended without a patch. "
        "Run it again with POST /api/v1/tasks/task-001/rerun."
    )
    assert list(tasks.entries) == ["task-001"]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [(RERUN, {}), ("/api/v1/tasks/task-001/continue", {"prompt": "Look."})],
    ids=["rerun", "continue"],
)
def test_dry_run_validates_the_changes_and_submits_nothing(api, ended, path, prompt):
    valid = {"overrides": ["vm.cpus=2", "metadata.id=task-002"], **prompt}
    headers = {"Idempotency-Key": "6f1c"}
    response = api.post(f"{path}?dry_run=true", json=valid, headers=headers)
    assert (response.status_code, response.json()["dry_run"]) == (200, True)
    assert response.json()["definition"]["vm"]["cpus"] == 2
    invalid = {"overrides": ["vm.cpus=many"], **prompt}
    dry_run = api.post(f"{path}?dry_run=true", json=invalid)
    assert (dry_run.status_code, dry_run.json()["details"]) == (400, api.post(path, json=invalid).json()["details"])
    assert list(ended.entries) == ["task-001"]
    assert api.post(path, json=valid, headers=headers).status_code == 202
    assert api.post(f"{path}?dry_run=true", json=valid).status_code == 409  # the id exists now


def test_dry_run_rejects_a_task_that_cannot_be_continued(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    response = api.post(f"{CONTINUE}?dry_run=true", json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]) == (409, "task_not_ended")


@pytest.mark.parametrize("task_id", ["absent", "..", "%2e%2e", "a%2Fb", "x" * 5000, "%00"])
def test_hostile_parent_id_is_reported_as_an_unknown_task(api, ended, task_id):
    response = api.post(f"/api/v1/tasks/{task_id}/continue", json={"prompt": "x"})
    assert response.status_code == 404
    assert list(ended.entries) == ["task-001"]


def test_rerun_of_a_continuation_keeps_the_parent(api, ended):
    response = api.post(RERUN, json={"overrides": ["metadata.id=task-002", "vm.cpus=2"]})
    assert response.status_code == 202
    assert ended.entries["task-002"].task.parent == ended.inheritances["task-001"].parent
    assert ended.entries["task-002"].task.rerun_of == "task-001"
    response = api.post(RERUN, json={"overrides": ["repository.commit=" + "a" * 40]})
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")


def test_continue_with_an_idempotency_key_can_be_repeated_safely(api, ended):
    headers, body = {"Idempotency-Key": "6f1c"}, {"prompt": "x"}
    first, second = (api.post(CONTINUE, headers=headers, json=body) for _ in range(2))
    assert (second.status_code, second.json()) == (202, first.json())
    assert api.post(CONTINUE, headers=headers, json={"prompt": "y"}).status_code == 422
    assert len(ended.entries) == 2
