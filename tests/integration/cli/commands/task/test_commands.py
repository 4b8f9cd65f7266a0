"""The commands of `sandbox task`: stdout, stderr and exit codes."""

import hashlib
import json
import os
from urllib.parse import quote

import pytest

from doubles.fake_api import ApiResponse, error_response, json_response, sse_response
from doubles.manifests import parse_manifest
from doubles.sample_task import TASK_ID, task_events, task_status
from sandbox.cli.submission import field_error_details
from sandbox.model.manifest.parser import InvalidManifestError
from sandbox.model.repository_urls import repository_names

MANIFEST = b"""\
version: "1"
kind: Task
metadata: {name: "Fix bug #42"}
repository: {url: "https://github.com/org/app.git", branch: main}
claude: {prompt: "Fix it"}
"""
FIELD_ERROR = {"field": "vm.memory", "rule": "format", "message": "must be a size", "line": 12, "column": 3}


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "task.yaml").write_bytes(MANIFEST)
    return "task.yaml"


@pytest.fixture
def task(api):
    """An API with one task. Call the fixture with the final state."""

    def end_as(state: str) -> None:
        submitted = {"task_id": TASK_ID, "state": "pending", "message": "", "created_at": "", "links": {}}
        api.on("POST", "/tasks", json_response(submitted, 202))
        api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")), json_response(task_status(state)))
        api.on("GET", f"/tasks/{TASK_ID}/wait", json_response(task_status(state)))
        api.on(
            "GET",
            f"/tasks/{TASK_ID}/logs",
            lambda request: sse_response(task_events()) if "follow" in request.query else ApiResponse(),
        )

    end_as("completed")
    return end_as


def test_manifest_is_printed_as_yaml_or_json(run_cli, api):
    parsed = {
        **{"version": "1", "kind": "Task", "metadata": {"name": "Fix bug #42"}},
        **{"repository": {"url": "https://github.com/org/app.git", "branch": "main"}, "claude": {"prompt": "Fix it"}},
    }
    api.on("GET", f"/tasks/{TASK_ID}/manifest", json_response(parsed))
    result = run_cli("task", "manifest", TASK_ID)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(b'version: "1"\nkind: Task\n')
    assert parse_manifest(result.stdout, is_json=False) == parse_manifest(MANIFEST, is_json=False)
    assert json.loads(run_cli("task", "manifest", TASK_ID, "--format", "json").stdout) == parsed


def test_manifest_of_an_unknown_task_is_an_error(run_cli, api):
    api.on("GET", "/tasks/gone/manifest", error_response(404, "task_not_found", "There is no task 'gone'."))
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0, "next_cursor": None}))
    result = run_cli("task", "manifest", "gone")
    assert (result.returncode, result.stdout) == (3, b"")


def test_submit_prints_only_the_id_on_stdout(run_cli, task, api, manifest):
    result = run_cli("task", "submit", manifest)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{TASK_ID}\n".encode(), b"")
    assert api.requests_to("POST", "/tasks")[0].body == MANIFEST


def test_submit_reads_stdin(run_cli, task, api):
    assert run_cli("task", "submit", "-", stdin=MANIFEST).returncode == 0
    assert run_cli("task", "submit", "-", stdin=b'{"version": "1"}').returncode == 0
    kinds = [request.headers["content-type"] for request in api.requests_to("POST", "/tasks")]
    assert kinds == ["application/yaml", "application/json"]


def test_submit_uses_the_id_option(run_cli, task, api, manifest):
    assert run_cli("task", "submit", manifest, "--id", "mine-1").returncode == 0
    sent = json.loads(api.requests_to("POST", "/tasks")[0].body)
    assert sent["metadata"] == {"name": "Fix bug #42", "id": "mine-1"}
    assert sent["claude"]["prompt"] == "Fix it"


def test_manifest_with_a_replaced_id_is_valid(run_cli, task, api, manifest):
    from doubles.manifests import parse_manifest

    run_cli("task", "submit", manifest, "--id", "mine-1")
    body = api.requests_to("POST", "/tasks")[0].body
    assert parse_manifest(body, is_json=True).metadata.id == "mine-1"


@pytest.mark.parametrize("option", ["--wait", "-w", "--follow"])
@pytest.mark.parametrize(
    ("state", "code"), [("completed", 0), ("failed", 1), ("failed_preserved", 1), ("cancelled", 8)]
)
def test_exit_code_reflects_the_final_state(run_cli, task, manifest, option, state, code):
    task(state)
    result = run_cli("task", "submit", manifest, option)
    assert result.returncode == code
    assert result.stdout == f"{TASK_ID}\n".encode()


def test_failure_message_suggests_next_commands(run_cli, task, api, manifest):
    error = {"code": "timeout", "message": "It took \x1b[31m too long."}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed_preserved", error=error)))
    result = run_cli("task", "wait", TASK_ID)
    assert (result.returncode, result.stdout) == (1, b"failed_preserved\n")
    assert result.stderr.decode().splitlines() == [
        r"Task fix-42 failed: It took \x1b[31m too long. (timeout)",
        "  See what happened: sandbox task logs fix-42",
        "  Its sandbox is preserved.",
        "  Open a shell:      sandbox task shell fix-42",
        "  Remove it:         sandbox task release fix-42",
    ]


def test_follow_prints_uncolored_events_without_a_terminal(run_cli, task, manifest):
    result = run_cli("task", "submit", manifest, "--follow")
    assert b"running       Claude Code is working\n" in result.stderr
    assert b"\x1b" not in result.stderr


def test_json_follow_prints_one_event_per_line(run_cli, task, manifest):
    result = run_cli("task", "submit", manifest, "--follow", "-f", "json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == task_events()


def test_manifest_errors_have_source_positions(run_cli, api, manifest):
    api.on("POST", "/tasks", error_response(400, "invalid_manifest", "The manifest has 1 error.", [FIELD_ERROR]))
    result = run_cli("task", "submit", manifest)
    assert result.returncode == 9
    assert result.stderr == b"task.yaml:12:3: vm.memory: must be a size\nError: task.yaml has 1 error.\n"


def test_all_errors_of_a_request_are_printed(run_cli, api):
    details = [
        {"location": "query.limit", "field": "limit", "rule": "range", "message": "must be at most 1000"},
        {"location": "query.sort", "field": "sort", "rule": "enum", "message": "must be one of name\x1b[2J"},
    ]
    api.on("GET", "/tasks", error_response(400, "invalid_parameter", "The request has 2 errors.", details))
    result = run_cli("task", "list")
    assert result.returncode == 2
    assert result.stderr.decode().splitlines() == [
        "query.limit: must be at most 1000",
        "query.sort: must be one of name\\x1b[2J",
        "Error: The request has 2 errors.",
    ]


def test_a_single_error_of_a_request_is_printed_once(run_cli, api):
    detail = {"location": "query.limit", "field": "limit", "rule": "range", "message": "must be at most 1000"}
    message = "The request is invalid: query.limit must be at most 1000."
    api.on("GET", "/tasks", error_response(400, "invalid_parameter", message, [detail]))
    assert run_cli("task", "list").stderr.decode().splitlines() == [f"Error: {message}"]


def test_validate_accepts_a_byte_order_mark(run_cli, tmp_path):
    data = {"version": "1", "kind": "Task", "metadata": {"name": "n"}, "claude": {"prompt": "p"}}
    data["repository"] = {"url": "https://example.org/r.git", "branch": "main"}
    for name in ("task.yaml", "task.json", "task"):
        (tmp_path / name).write_text(json.dumps(data, indent="\t"), encoding="utf-8-sig")
        result = run_cli("task", "validate", name)
        assert result.returncode == 0, result.stderr


def test_validate_works_without_a_server(run_cli, api, manifest, tmp_path):
    assert run_cli("task", "validate", manifest).returncode == 0
    (tmp_path / "bad.yaml").write_bytes(MANIFEST + b"vm: {memory: lots}\n")
    result = run_cli("task", "validate", "bad.yaml")
    assert result.returncode == 9
    assert result.stdout.startswith(b"bad.yaml:6:14: vm.memory: must be ")
    document = json.loads(run_cli("task", "validate", "bad.yaml", "-f", "json").stdout)
    assert (document["valid"], document["details"][0]["field"]) == (False, "vm.memory")
    assert api.requests == []


@pytest.mark.parametrize(
    ("http_status", "error", "code"),
    [
        (400, "invalid_parameter", 2),
        (401, "unauthorized", 5),
        (403, "forbidden", 5),
        (404, "artifact_not_found", 3),
        (409, "task_already_terminal", 4),
        (429, "rate_limit_exceeded", 10),
        (500, "internal_error", 10),
        (503, "service_unavailable", 10),
        (507, "insufficient_resources", 10),
    ],
)
def test_api_errors_map_to_exit_codes_and_one_message(run_cli, api, http_status, error, code):
    api.on("GET", f"/tasks/{TASK_ID}", error_response(http_status, error, "Failed \x1b[31m."))
    result = run_cli("task", "status", TASK_ID)
    assert (result.returncode, result.stdout) == (code, b"")
    assert result.stderr == b"Error: Failed \\x1b[31m.\n"


def test_unreachable_server_exits_with_6(run_cli):
    result = run_cli("task", "list", "--server", "http://127.0.0.1:9")
    assert result.returncode == 6
    assert b"Start it with: sandbox serve" in result.stderr


def test_status_shows_the_task(run_cli, api):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed")))
    result = run_cli("task", "status", TASK_ID)
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[:3] == ["Task        fix-42", "Name        Fix bug #42", "State       failed  Claude Code is working"]
    assert lines[-3:] == [
        "Error       Claude Code exited with 1. (agent_failed)",
        "Logs        sandbox task logs fix-42",
        "Rerun       sandbox task rerun fix-42",
    ]
    assert json.loads(run_cli("task", "status", TASK_ID, "--format", "json").stdout) == task_status("failed")


DIFF = {"files": 2, "additions": 1016, "deletions": 4}


def show_on_terminal(on_terminal, terminal, *arguments):
    terminal.resize(100)
    text = terminal.read_to_end(on_terminal(*arguments, "--no-color")).decode()
    return text.replace("\r", "").splitlines()


def test_status_on_a_terminal_begins_with_the_outcome(api, on_terminal, terminal):
    message = "\n".join(["Fixed \x1b[31m.", "", *map(str, range(20))])
    task = task_status("completed", diff=DIFF, duration_seconds=125.0, final_message=message)
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
    lines = show_on_terminal(on_terminal, terminal, "task", "status", TASK_ID)
    assert lines[: lines.index("")] == [
        "State       completed  Claude Code is working",
        "Changes     +1,016 −4 in 2 files",
        r"Message     Fixed \x1b[31m.",
        *[f"{'':12}{number}" for number in range(8)],
        f"{'':12}…",
        "Cost        $0.0895",
        "Duration    2 min 5 s",
        f"Dashboard   {api.url}/tasks/{TASK_ID}",
    ]
    details = lines[lines.index("") + 1 :]
    assert details[:2] == ["Task        fix-42", "Name        Fix bug #42"]
    assert details[-5:] == [
        "",
        f"Diff        sandbox task diff {TASK_ID}",
        f"Apply       sandbox task apply {TASK_ID}",
        f"Commit      sandbox task apply {TASK_ID} --branch sandbox/{TASK_ID}",
        f'Continue    sandbox task continue {TASK_ID} "…"',
    ]
    assert not [line for line in details if line.startswith(("State", "Cost"))]


def test_status_in_a_pipe_ends_with_the_result_and_the_next_commands(run_cli, api):
    task = task_status("completed", diff=DIFF, final_message="Fixed \x1b[31m.\n\nAll tests pass.")
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
    lines = run_cli("task", "status", TASK_ID).stdout.decode().splitlines()
    assert lines[0] == "Task        fix-42"
    assert lines[-7:] == [
        "Changes     +1,016 −4 in 2 files",
        r"Message     Fixed \x1b[31m.",
        f"{'':12}All tests pass.",
        "Diff        sandbox task diff fix-42",
        "Apply       sandbox task apply fix-42",
        "Commit      sandbox task apply fix-42 --branch sandbox/fix-42",
        'Continue    sandbox task continue fix-42 "…"',
    ]


def test_status_of_a_failed_task_suggests_the_remedy(api, on_terminal, terminal):
    remedy = {"text": "Raise vm.memory.", "field": "vm.memory", "overrides": ["vm.memory=4G"]}
    error = {"code": "out_of_memory", "message": "x.com: vm.memory (2G) was used up; raise it.", "remedy": remedy}
    changes = {"diff": DIFF, "error": error, "final_message": "Building"}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed_preserved", **changes)))
    lines = show_on_terminal(on_terminal, terminal, "task", "status", TASK_ID)
    assert lines[:3] == [
        "State       failed, preserved  Claude Code is working",
        "Error       x.com: vm.memory (2G) was used up; raise it. (out_of_memory)",
        "Changes     +1,016 −4 in 2 files",
    ]
    assert lines[3] == "Message     Building"
    assert lines[-6:] == [
        "",
        f"Diff        sandbox task diff {TASK_ID}",
        f'Continue    sandbox task continue {TASK_ID} "…"',
        f"Rerun       sandbox task rerun {TASK_ID} --set vm.memory=4G",
        f"Shell       sandbox task shell {TASK_ID}",
        f"Release it  sandbox task release {TASK_ID}",
    ]


def test_followed_failure_on_a_terminal_suggests_the_next_commands(task, api, manifest, on_terminal, terminal):
    remedy = {"text": "Raise lifecycle.timeout.", "field": "lifecycle.timeout", "overrides": ["lifecycle.timeout=2h"]}
    message = "The agent was still working after 1h; raise lifecycle.timeout."
    failed = task_status("failed", error={"code": "timeout", "message": message, "remedy": remedy}, diff=DIFF)
    for path in (f"/tasks/{TASK_ID}", f"/tasks/{TASK_ID}/wait"):
        api.on("GET", path, json_response(failed))
    lines = show_on_terminal(on_terminal, terminal, "task", "submit", manifest, "--follow")
    assert lines[-4].endswith("  Diff:              sandbox task diff fix-42")  # after control sequences
    assert lines[-3:] == [
        '  Continue:          sandbox task continue fix-42 "…"',
        "  Rerun:             sandbox task rerun fix-42 --set lifecycle.timeout=2h",
        "Task fix-42 failed: The agent was still working after 1h; raise lifecycle.timeout.",
    ]


@pytest.mark.parametrize("has_changes", [True, False])
def test_followed_task_offers_apply_only_if_it_has_changes(task, api, manifest, run_cli, has_changes):
    diff = DIFF if has_changes else {"files": 0, "additions": 0, "deletions": 0}
    for path in (f"/tasks/{TASK_ID}", f"/tasks/{TASK_ID}/wait"):
        api.on("GET", path, json_response(task_status("completed", diff=diff)))
    lines = run_cli("task", "submit", manifest, "--follow").stderr.decode().splitlines()
    assert (f"Task fix-42 completed{'' if has_changes else ' without changes'}.") in lines
    assert ("  Apply:     sandbox task apply fix-42" in lines) == has_changes
    assert ("  Diff:      sandbox task diff fix-42" in lines) == has_changes
    assert ("  Changes:   +1,016 −4 in 2 files" in lines) == has_changes
    assert '  Continue:  sandbox task continue fix-42 "…"' in lines


def serve_chain(api, patch, diff=DIFF, **entry):
    """Serve a task that continues another one, and the patch of the chain."""
    status = task_status("completed", diff=diff, parent="fix-41")
    for path in (f"/tasks/{TASK_ID}", f"/tasks/{TASK_ID}/wait"):
        api.on("GET", path, json_response(status))
    name = f"{TASK_ID}.chain.patch"
    listed = {"name": name, "path": f".sandbox/{name}", "contains_secret": False, "size_bytes": len(patch), **entry}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": [listed]}))
    checksum = {"X-Checksum-SHA256": hashlib.sha256(patch).hexdigest()}
    route = f"/tasks/{TASK_ID}/artifacts/{quote(f'.sandbox/{name}', safe='')}"
    api.on("GET", route, lambda _: ApiResponse(200, [patch], checksum))


CHAIN_PATCH = b"diff --git a/a b/a\n--- a/a\n+++ b/a\n@@ -1 +1,2 @@\n--- x\n+++ y\n+z\n"


def test_status_and_follow_show_the_sizes_of_both_patches_of_a_chain(task, api, manifest, run_cli):
    serve_chain(api, CHAIN_PATCH)
    size = "+1,016 −4 in 2 files (chain: +2 −1 in 1 file)"
    assert f"Changes     {size}\n" in run_cli("task", "status", TASK_ID).stdout.decode()
    assert f"  Changes:   {size}\n" in run_cli("task", "submit", manifest, "--follow").stderr.decode()


@pytest.mark.parametrize(("patch", "is_offered"), [(CHAIN_PATCH, True), (b"", False)])
def test_changes_of_a_chain_can_be_applied_if_its_last_task_changed_nothing(api, run_cli, patch, is_offered):
    serve_chain(api, patch, {"files": 0, "additions": 0, "deletions": 0})
    output = run_cli("task", "status", TASK_ID).stdout.decode()
    assert (f"sandbox task diff {TASK_ID} --chain\n" in output) == is_offered
    assert (f"sandbox task apply {TASK_ID} --chain\n" in output) == is_offered
    assert (f"sandbox task logs {TASK_ID}\n" in output) != is_offered


@pytest.mark.parametrize("entry", [{"contains_secret": True}, {"size_bytes": 10**9}])
def test_large_or_secret_patch_of_a_chain_is_not_downloaded_to_find_its_size(api, run_cli, entry):
    serve_chain(api, CHAIN_PATCH, **entry)
    assert "Changes     +1,016 −4 in 2 files\n" in run_cli("task", "status", TASK_ID).stdout.decode()


def test_refused_model_requests_are_not_counted_as_connections(run_cli, api):
    task = task_status("completed")
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task | {"progress": task["progress"] | {"egress_denied": 2}}))
    base = {"type": "egress_denied", "task_id": TASK_ID, "seq": 1, "timestamp": "2026-01-29T10:00:00.000Z"}
    denied = [{**base, "host": host, "port": 1, "reason": "x"} for host in ("model", "a.example")]
    log = "".join(f"[2026-01-29T10:00:00.000Z] [EVENT] {json.dumps(event)}\n" for event in denied).encode()
    api.on("GET", f"/tasks/{TASK_ID}/logs", lambda _: ApiResponse(200, [log], {"content-type": "text/plain"}))
    output = run_cli("task", "status", TASK_ID).stdout.decode()
    assert "Refused     1 connection to a.example:1: x\n" in output
    assert "Allow" not in output  # no manifest can allow this host


def test_status_names_the_refused_hosts(run_cli, api):
    task = task_status("completed")
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task | {"progress": task["progress"] | {"egress_denied": 9}}))
    base = {"type": "egress_denied", "task_id": TASK_ID, "seq": 1, "timestamp": "2026-01-29T10:00:00.000Z"}
    hosts = [*(f"{letter}.example" for letter in "abcdefg"), "g.example", "g.example"]
    denied = [{**base, "host": host, "port": 443, "reason": "x"} for host in hosts]
    log = "".join(f"[2026-01-29T10:00:00.000Z] [EVENT] {json.dumps(event)}\n" for event in denied).encode()
    api.on("GET", f"/tasks/{TASK_ID}/logs", lambda _: ApiResponse(200, [log], {"content-type": "text/plain"}))
    shown = ", ".join(f"{letter}.example:443" for letter in "gabcd")
    assert f"Refused     9 connections to {shown}, 2 more: x\n" in run_cli("task", "status", TASK_ID).stdout.decode()


def serve_refusals(api, task, *refusals, count):
    """Serve a task whose log contains these refusals (host, port, reason). count: their number in the task's status."""
    task = task | {"progress": task["progress"] | {"egress_denied": count}}
    for path in (f"/tasks/{TASK_ID}", f"/tasks/{TASK_ID}/wait"):
        api.on("GET", path, json_response(task))
    base = {"type": "egress_denied", "task_id": TASK_ID, "seq": 1, "timestamp": "2026-01-29T10:00:00.000Z"}
    denied = [{**base, "host": host, "port": port, "reason": reason} for host, port, reason in refusals]
    log = "".join(f"[2026-01-29T10:00:00.000Z] [EVENT] {json.dumps(event)}\n" for event in denied).encode()

    def send_log(request):
        is_followed = "follow" in request.query
        return sse_response(task_events()) if is_followed else ApiResponse(200, [log], {"content-type": "text/plain"})

    api.on("GET", f"/tasks/{TASK_ID}/logs", send_log)


ISOLATED_REASON = "vm.network_mode is isolated: only the model is reachable."
ALLOW_COMMAND = f"sandbox task rerun {TASK_ID} --set vm.network_mode=outbound --set 'vm.allowed_hosts[0]=a.example'"


def test_status_shows_reasons_for_refusals_and_the_command_that_allows_the_hosts(run_cli, api, on_terminal, terminal):
    refusals = [("a.example", 443, ISOLATED_REASON), ("10.0.0.1", 80, "it is not a public address.")]
    serve_refusals(api, task_status("completed"), *refusals, count=5)
    rows = [
        f"Refused     1 connection to a.example:443: {ISOLATED_REASON}",
        "Refused     1 connection to 10.0.0.1:80: it is not a public address.",
        f"Refused     3 connections: sandbox task logs {TASK_ID} --stream events",
    ]
    lines = run_cli("task", "status", TASK_ID).stdout.decode().splitlines()
    assert [line for line in lines if line.startswith(("Refused", "Allow"))] == [*rows, f"Allow       {ALLOW_COMMAND}"]
    # On a terminal, text is wrapped but a command stays on one line, so that users can copy it.
    assert f"Allow       {ALLOW_COMMAND}" in show_on_terminal(on_terminal, terminal, "task", "status", TASK_ID)


@pytest.mark.parametrize("state", ["completed", "failed"])
def test_followed_task_ends_with_the_command_that_allows_the_refused_hosts(task, api, manifest, run_cli, state):
    task(state)
    serve_refusals(api, task_status(state), ("a.example", 443, ISOLATED_REASON), count=1)
    stderr = run_cli("task", "submit", manifest, "--follow").stderr.decode()
    assert f"  1 host refused. Allow in a new run:\n  {ALLOW_COMMAND}\n" in stderr
    serve_refusals(api, task_status(state), count=0)
    assert "refused. Allow" not in run_cli("task", "submit", manifest, "--follow").stderr.decode()


def test_status_shows_how_much_of_the_budget_is_used(run_cli, api):
    lifecycle = {"budget_usd": 0.5, "budget_tokens": 30000}
    task = task_status("running", definition={"lifecycle": lifecycle})
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
    output = run_cli("task", "status", TASK_ID).stdout.decode()
    assert "Budget      $0.0895 of $0.50 · 27,501 of 30,000 tokens\n" in output
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task | {"definition": {"lifecycle": {}}}))
    assert "Budget" not in run_cli("task", "status", TASK_ID).stdout.decode()


JOB = {"id": "17", "phase": "waiting", "host": None, "reason": "The job is waiting in Slurm's queue (Resources)."}


@pytest.mark.parametrize(
    ("host", "job", "row"),
    [
        (None, None, None),
        ("node-1", None, "node-1"),
        (None, JOB, "job 17 · The job is waiting in Slurm's queue (Resources)."),
        (None, {**JOB, "id": None, "phase": "unknown", "reason": "It is being submitted."}, "It is being submitted."),
        ("node-1", {**JOB, "phase": "running", "host": "node-2"}, "node-2 · job 17"),
        ("node\x1b[31m", None, r"node\x1b[31m"),
    ],
)
def test_status_shows_the_host_and_the_job_of_a_task_on_a_cluster(run_cli, api, host, job, row):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running", host=host, job=job)))
    lines = run_cli("task", "status", TASK_ID).stdout.decode().splitlines()
    assert [line for line in lines if line.startswith("Host")] == ([] if row is None else [f"Host        {row}"])


def test_message_of_a_failed_task_is_shown_unless_it_repeats_the_error(run_cli, api):
    error = {"code": "budget_exceeded", "message": "The budget is spent. Raise it."}
    for message, is_shown in (("I fixed two files.", True), ("API Error: 403 The budget is spent.  Raise it.", False)):
        api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed", error=error, final_message=message)))
        assert ("Message" in run_cli("task", "status", TASK_ID).stdout.decode()) == is_shown


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("Find the\n\nbug \x1b[31m.", r"Find the bug \x1b[31m."),
        ("word " * 100, "word " * 59 + "word…"),
        ("Fix bug #42", None),
    ],
)
def test_status_shows_the_beginning_of_a_prompt_that_the_name_does_not_repeat(run_cli, api, prompt, shown):
    definition = {"repository": {}, "claude": {"prompt": prompt}}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed") | {"definition": definition}))
    lines = run_cli("task", "status", TASK_ID).stdout.decode().splitlines()
    assert [line[12:] for line in lines if line.startswith("Prompt")] == ([] if shown is None else [shown])


def test_diff_lists_the_changed_files_with_their_lines(run_cli, api):
    serve_chain(api, CHAIN_PATCH)
    result = run_cli("task", "diff", TASK_ID, "--chain", "--stat")
    assert (result.returncode, result.stdout) == (0, b"+2 -1  a\n1 file changed, 2 insertions(+), 1 deletion(-)\n"), (
        result.stderr
    )


@pytest.mark.parametrize("command", [("submit", "MANIFEST", "--follow"), ("status", TASK_ID, "--watch")])
def test_reason_for_a_failure_is_stated_once_at_the_end(task, manifest, run_cli, command):
    task("failed")
    result = run_cli("task", *(manifest if word == "MANIFEST" else word for word in command))
    lines = (result.stdout + result.stderr).decode().splitlines()
    stated = [line for line in lines if "Claude Code exited with 1" in line]
    assert stated == ["Task fix-42 failed: Claude Code exited with 1."]


@pytest.mark.parametrize(
    ("state", "last"),
    [("completed", "Task fix-42 completed."), ("failed", "Task fix-42 failed: Claude Code exited with 1.")],
)
def test_watched_status_ends_with_the_outcome(run_cli, task, state, last):
    task(state)
    assert run_cli("task", "status", TASK_ID, "--watch").stdout.decode().splitlines()[-1] == last


@pytest.mark.parametrize(
    ("runtime", "tier", "expected"),
    [("gvisor", "gvisor", "gvisor · agentic-dev"), ("qemu", "vm", "qemu · vm · agentic-dev")],
)
def test_status_shows_runtime_and_tier_without_repetition(run_cli, api, runtime, tier, expected):
    vm = {"runtime": runtime, "tier": tier, "profile": "agentic-dev"}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running", vm=vm)))
    assert f"Sandbox     {expected}\n" in run_cli("task", "status", TASK_ID).stdout.decode()


@pytest.mark.parametrize("is_preserved", [True, False])
def test_output_suggests_release_and_shell_if_the_sandbox_is_preserved(run_cli, api, is_preserved):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed_preserved", sandbox_kept=is_preserved)))
    output = run_cli("task", "status", TASK_ID).stdout.decode() + run_cli("task", "wait", TASK_ID).stderr.decode()
    assert output.count(f"sandbox task release {TASK_ID}") == 2 * is_preserved
    assert output.count(f"sandbox task shell {TASK_ID}") == 2 * is_preserved
    assert (" · preserved\n" in output, " · released\n" in output) == (is_preserved, not is_preserved)


def test_commands_suggested_by_status_on_a_terminal_contain_the_short_id(api, on_terminal, terminal):
    task = task_status("failed_preserved", GENERATED_ID, diff=DIFF)
    api.on("GET", f"/tasks/{GENERATED_ID}", json_response(task))
    lines = show_on_terminal(on_terminal, terminal, "task", "status", GENERATED_ID)
    commands = [line[12:] for line in lines if line[12:].startswith("sandbox task ")]
    assert [command.split()[3] for command in commands] == [GENERATED_ID[:8]] * 5


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ({"sandbox_kept": False}, b"failed, released"),
        ({"sandbox_kept": True}, b"failed, preserved"),
        ({}, b"failed, preserved"),
    ],
)
def test_terminal_shows_whether_the_sandbox_is_preserved(api, run_cli, on_terminal, terminal, status, shown):
    """Without a terminal, the state is printed unchanged. Responses from earlier servers have no `sandbox_kept`."""
    task = task_status("failed_preserved", error={"code": "agent_failed", "message": "It failed."})
    del task["sandbox_kept"]
    page = {"tasks": [{**task, **status}], "total_count": 1, "limit": 100, "offset": 0, "has_more": False}
    api.on("GET", "/tasks", json_response({**page, "next_cursor": None}))
    api.on("GET", f"/tasks/{TASK_ID}", json_response({**task, **status}))
    output = run_cli("task", "list").stdout.rstrip()
    assert b" failed_preserved " in output
    assert output.endswith(b" agent_failed (released)" if status == {"sandbox_kept": False} else b" agent_failed")
    on_terminal("task", "list").wait(30)
    assert shown in terminal.read_until(b"Fix bug")
    if status:
        terminal.output = b""
        on_terminal("task", "status", TASK_ID).wait(30)
        assert shown in terminal.read_until(b"Created")


def test_watch_prints_events_until_the_task_ends(run_cli, task):
    result = run_cli("task", "status", TASK_ID, "--watch")
    assert result.returncode == 0
    assert b"completed     Claude Code finished its work\n" in result.stdout


def test_watch_that_starts_late_prints_all_states_once(run_cli, api):
    events = task_events()
    now = next(at for at, event in enumerate(events) if event["type"] == "usage") + 1
    past = [event for event in events[:now] if event["type"] not in {"output", "agent_message"}]
    lines = [f"[t] [EVENT] {json.dumps(event)}\n".encode() for event in past]
    requested_after = []

    def logs(request):
        if "follow" not in request.query:
            return ApiResponse(200, lines)
        requested_after.append(int(request.query["after"][0]))
        return sse_response([event for event in events if event["seq"] > requested_after[0]])

    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    api.on("GET", f"/tasks/{TASK_ID}/logs", logs)
    output = run_cli("task", "status", TASK_ID, "--watch").stdout.decode()
    states = [line.split()[1] for line in output.splitlines() if line[2:3] == ":"]
    assert states == [
        *[event["new_state"] for event in events if event["type"] == "state_change"][:5],
        "Refused",
        "completing",
        "completed",
        "35",
    ]
    assert "4 tool calls · 26,911 tokens in, 590 out" in output
    assert requested_after == [5]  # an earlier position, so that the running tool call is included


def test_status_shows_cost_and_refused_connections(run_cli, api):
    task = task_status("completed")
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task | {"progress": task["progress"] | {"egress_denied": 2}}))
    lines = run_cli("task", "status", TASK_ID).stdout.decode().splitlines()
    assert [line for line in lines if line.startswith(("Tokens", "Cost", "Refused"))] == [
        "Tokens      26,911 in, 590 out",
        "Cost        $0.0895",
        f"Refused     2 connections: sandbox task logs {TASK_ID} --stream events",
    ]
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task | {"progress": task["progress"] | {"egress_denied": 0}}))
    assert b"Refused" not in run_cli("task", "status", TASK_ID).stdout


def test_watch_of_an_ended_task_shows_its_state(run_cli, api):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    assert b"State       completed" in run_cli("task", "status", TASK_ID, "-w").stdout


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("cancelled", 8), ("running", 7)])
def test_wait_prints_the_final_state(run_cli, task, state, code):
    task(state)
    result = run_cli("task", "wait", TASK_ID, "--timeout", "1s")
    assert (result.returncode, result.stdout) == (code, f"{state}\n".encode())


def test_wait_on_a_terminal_formats_the_state_as_in_the_dashboard(task, on_terminal, terminal):
    task("failed_preserved")
    assert show_on_terminal(on_terminal, terminal, "task", "wait", TASK_ID)[0] == "failed, preserved"


@pytest.mark.parametrize("arguments", [[], ["--format", "table"]])
def test_list_never_truncates_ids(run_cli, api, arguments):
    task_id = "x" * 128
    tasks = [task_status("running", task_id=task_id, name="n" * 256), task_status("failed")]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 7}))
    result = run_cli("task", "list", *arguments)
    assert task_id.encode() in result.stdout
    assert b"n" * 256 in result.stdout
    assert result.stderr == b"2 of 7 tasks; see more with --limit, or --all.\n"


def test_list_sends_filters(run_cli, api):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    result = run_cli("task", "list", "--state", "running", "--label", "team=platform", "--limit", "5")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"No such tasks.\n")
    expected = {"state": ["running"], "label.team": ["platform"], "limit": ["5"]}
    assert api.requests[0].query == expected


@pytest.mark.parametrize("option", ["--repo", "--repository"])
def test_list_accepts_both_names_of_the_repository_filter(run_cli, api, option):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    run_cli("task", "list", option, "org/app", "--search", "basket")
    assert api.requests[0].query == {"repository": ["org/app"], "q": ["basket"]}


@pytest.mark.parametrize("arguments", [("--query", "basket"), ("--query=basket",), ("--query",)])
def test_search_option_is_suggested_for_the_name_of_the_api_parameter(run_cli, api, arguments):
    result = run_cli("task", "list", *arguments)
    assert result.returncode == 2
    assert "No such option '--query'. Did you mean '--search'?" in result.stderr.decode()
    assert b"--query" not in run_cli("task", "list", "--help").stdout
    assert not api.requests


def test_list_sends_a_repeated_state_once(run_cli, api):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    run_cli("task", "list", "--state", "failed,running", "--state", "failed")
    assert api.requests[0].query == {"state": ["failed,running"]}


def test_list_shows_totals_of_all_pages(run_cli, api):
    totals = {"tasks": 1234, "cost_usd": 56.789}
    page = {"tasks": [task_status("completed")], "total_count": 1234, "next_cursor": None, "totals": totals}
    api.on("GET", "/tasks", json_response(page))
    result = run_cli("task", "list", "--sort", "cost", "--totals", "--limit", "1")
    assert api.requests[0].query == {"limit": ["1"], "sort": ["cost"], "totals": ["true"]}
    assert result.stderr.decode().splitlines() == [
        "1 of 1,234 tasks; see more with --limit, or --all.",
        "Total: 1,234 tasks, $56.79",
    ]
    assert json.loads(run_cli("task", "list", "--totals", "--format", "json").stdout) == page


def test_totals_are_requested_once_for_all_pages(run_cli, api):
    totals = {"tasks": 2, "cost_usd": 1.0}
    pages = [
        {"tasks": [task_status("completed", "a")], "total_count": 2, "next_cursor": "next", "totals": totals},
        {"tasks": [task_status("completed", "b")], "total_count": 2, "next_cursor": None, "totals": None},
    ]
    api.on("GET", "/tasks", lambda request: json_response(pages["cursor" in request.query]))
    page = json.loads(run_cli("task", "list", "--all", "--totals", "--format", "json").stdout)
    assert ([task["id"] for task in page["tasks"]], page["totals"]) == (["a", "b"], totals)
    assert ["totals" in request.query for request in api.requests] == [True, False]


def test_list_sends_searches(run_cli, api):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    period = ("--since", "2026-01-29T12:00:00+02:00", "--until", "2026-01-30T00:00:00Z")
    result = run_cli(
        "task", "list", "-q", 'fix "pars', "--repo", "org/app", "--parent", "fix-1", "--rerun-of", "fix-2", *period
    )
    assert (result.returncode, result.stderr) == (0, b"No such tasks.\n")
    assert api.requests[0].query == {
        "q": ['fix "pars'],
        "repository": ["org/app"],
        "parent": ["fix-1"],
        "rerun_of": ["fix-2"],
        "created_after": ["2026-01-29T10:00:00.000Z"],
        "created_before": ["2026-01-30T00:00:00.000Z"],
    }
    assert run_cli("task", "list", "--outcome", "failed,cancelled").returncode == 0
    assert api.requests[-1].query == {"outcome": ["failed,cancelled"]}
    for invalid in (("--outcome", "success"), ("--outcome", "failed", "--state", "running"), ("--since", "yesterday")):
        assert run_cli("task", "list", *invalid).returncode == 2
    assert run_cli("task", "list", "--since", "2h").returncode == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--state", "running,faild", "unknown state 'faild'; did you mean 'failed'?"),
        ("--outcome", "succeded", "unknown outcome 'succeded'; did you mean 'succeeded'?"),
        ("--outcome", "x", "unknown outcome 'x'; the outcomes are active, succeeded, failed, cancelled"),
    ],
)
def test_error_about_an_unknown_state_or_outcome_suggests_a_similar_one(run_cli, option, value, message):
    result = run_cli("task", "list", option, value)
    assert (result.returncode, result.stderr.decode().splitlines()[-1].partition(": ")[2]) == (
        2,
        f"Invalid value for '{option}': {message}",
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://git.example.org/org/app.git", "org/app"),
        ("git@git.example.org:org/app", "org/app"),
        ("ssh://git@git.example.org:22/group/org/app.git/", "org/app"),
        ("http://127.0.0.1:18130/example", "127.0.0.1:18130/example"),
        ("git@git.example.org:app.git", "git.example.org/app"),
        ("HTTPS://git.example.org/App.git", "git.example.org/App"),
    ],
)
def test_list_shows_repository_duration_and_cost(run_cli, api, url, shown):
    assert shown.lower() in repository_names(url)  # so that --repo finds the task
    known = task_status("completed")
    known |= {"repository": url, "branch": "main", "duration_seconds": 125.0}
    known["progress"] = {**known["progress"], "cost_usd": 1.25}
    older = task_status("pending", task_id="older")  # from an earlier server, which does not send these fields
    api.on("GET", "/tasks", json_response({"tasks": [known, older], "total_count": 2}))
    heading, line, last = run_cli("task", "list").stdout.decode().splitlines()
    assert heading.split()[4:8] == ["REPOSITORY", "CHANGES", "DURATION", "COST"]
    assert [text.strip() for text in line.split("  ") if text][4:7] == [shown, "2 min 5 s", "$1.25"]
    assert last.startswith("older")


def test_list_on_a_terminal_shows_changes_reasons_and_relations(api, run_cli, on_terminal, terminal):
    changed = {"diff": DIFF, "duration_seconds": 125.0, "repository": "https://git.example.org/org/app.git"}
    tasks = [
        task_status("completed", "first", labels={}, **changed),
        task_status("failed", "again", labels={}, rerun_of="first"),
        task_status("running", "next", labels={}, parent="first"),
    ]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 3}))
    piped = run_cli("task", "list").stdout.decode()
    columns = ["ID", "STATE", "AGE", "NAME", "REPOSITORY", "CHANGES", "DURATION", "COST", "LABELS", "REASON"]
    assert piped.splitlines()[0].split() == columns
    assert not [text for text in ("↻", "↳", "exited") if text in piped]
    assert piped.splitlines()[2].endswith(" agent_failed")
    terminal.resize(140)
    text = terminal.read_to_end(on_terminal("task", "list", "--no-color")).decode()
    heading, *lines = text.replace("\r", "").splitlines()
    assert heading.split() == [name for name in columns if name != "LABELS"]  # no task has labels
    assert "  Fix bug #42  " in lines[0]
    assert "  org/app     +1,016 −4  2 min 5 s  $0.0895" in lines[0]
    assert "  ↻ Fix bug #42  " in lines[1]
    assert lines[1].endswith("Claude Code exited with 1")
    assert "  ↳ Fix bug #42  " in lines[2]


CLONE_ERROR = "Cannot clone https://git.example.org/org/app.git: it has no branch 'nope'; check repository.branch."


@pytest.mark.parametrize("width", [60, 80])
def test_list_on_a_narrow_terminal_puts_reasons_below_failed_tasks(api, on_terminal, terminal, width):
    error = {"error": {"code": "clone_failed", "message": CLONE_ERROR}}
    url = {"repository": "https://git.example.org/org/app.git", "labels": {}}
    tasks = [task_status("failed", "bad", **url, **error), task_status("completed", "good", **url)]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 2}))
    terminal.resize(width)
    text = terminal.read_to_end(on_terminal("task", "list", "--no-color")).decode()
    caption, heading, *lines = text.replace("\r", "").splitlines()
    assert caption == "Repository: org/app"
    assert not {"REPOSITORY", "REASON"} & {*heading.split()}
    assert lines[0].startswith("bad ")
    assert lines[-1].startswith("good ")
    assert lines[1:-1] == ["  Cannot clone: it has no branch 'nope'"]
    assert all(line.startswith("  ") and len(line) <= width for line in lines[1:-1])


def test_list_with_several_repositories_or_a_border_keeps_the_columns(api, on_terminal, terminal):
    urls = [f"https://git.example.org/org/{name}.git" for name in ("app", "web")]
    tasks = [task_status("completed", url[-7:-4], repository=url, labels={}) for url in urls]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 2}))
    terminal.resize(120)
    text = terminal.read_to_end(on_terminal("task", "list", "--no-color")).decode()
    assert "REPOSITORY" in text.splitlines()[0]
    failed = task_status("failed", "bad", error={"code": "clone_failed", "message": CLONE_ERROR}, labels={})
    api.on("GET", "/tasks", json_response({"tasks": [failed], "total_count": 1}))
    text = terminal.read_to_end(on_terminal("task", "list", "--no-color", "-f", "table")).decode()
    assert "REASON" in text


GENERATED_ID = "3f2c1d7e-2222-4222-8222-abcdefabcdef"
LONG_NAME = "Fix the crash of the parser for files without a line ending"


@pytest.mark.parametrize(
    ("arguments", "shown_id", "has_cost", "name_cells"),
    [([], "3f2c1d7e", True, 34), (["--no-trunc"], GENERATED_ID, False, 15)],
)
def test_list_in_a_narrow_window_shortens_ids_and_omits_cost_before_the_name_becomes_unreadable(
    api, on_terminal, terminal, arguments, shown_id, has_cost, name_cells
):
    task = task_status("failed_preserved", GENERATED_ID, name=LONG_NAME, labels={})
    api.on("GET", "/tasks", json_response({"tasks": [task], "total_count": 1}))
    terminal.resize(80)
    text = terminal.read_to_end(on_terminal("task", "list", "--no-color", *arguments)).decode()
    heading, line = text.replace("\r", "").splitlines()[:2]
    assert heading.split()[:4] == ["ID", "STATE", "AGE", "NAME"]
    assert line.startswith(f"{shown_id}  failed, preserved  ")
    assert ("COST" in heading, "$0.0895" in line) == (has_cost, has_cost)
    assert f"  {LONG_NAME[: name_cells - 5]}" in line
    assert len(line) <= 80


def test_list_shortens_only_generated_ids_and_only_on_a_terminal(api, run_cli, on_terminal, terminal):
    chosen = "fix-the-crash-of-the-parser"
    tasks = [task_status("running", task_id) for task_id in (GENERATED_ID, chosen)]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 2}))
    assert GENERATED_ID in run_cli("task", "list").stdout.decode()
    assert json.loads(run_cli("task", "list", "-f", "json").stdout)["tasks"][0]["id"] == GENERATED_ID
    terminal.resize(80)
    output = terminal.read_to_end(on_terminal("task", "list", "--no-color")).decode()
    assert GENERATED_ID not in output
    assert ("3f2c1d7e " in output, f"{chosen} " in output) == (True, True)


LOG = b'[2026-01-29T10:10:15.123Z] [STDOUT] {"raw": "\x1b[31m\xff"}\n[2026-01-29T10:10:15.124Z] [STDERR] oh [x] y\n'


def test_raw_logs_without_a_terminal_are_raw_bytes(run_cli, api):
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [LOG[:40], LOG[40:]]))
    assert run_cli("task", "logs", TASK_ID, "--timestamps").stdout == LOG
    assert run_cli("task", "logs", TASK_ID, "--raw").stdout == b'[STDOUT] {"raw": "\x1b[31m\xff"}\n[STDERR] oh [x] y\n'
    assert run_cli("task", "logs", TASK_ID, "--raw", "--stream", "stdout", "--tail", "5").stdout.startswith(
        b'{"raw": "\x1b[31m\xff"}\n'
    )
    assert api.requests[-1].query == {"stream": ["stdout"], "tail": ["5"]}


def test_followed_raw_logs_have_the_log_format_and_end_when_the_task_ends(run_cli, task):
    result = run_cli("task", "logs", TASK_ID, "--follow", "--raw")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith('[EVENT] {"type":"state_change","task_id":"fix-42","seq":1,')
    assert lines[5].startswith('[STDOUT] {"type": "system"')
    assert len(lines) == len(task_events()) - 1


def test_followed_raw_output_joins_parts_of_a_line(run_cli, api, task):
    base = {"type": "output", "task_id": TASK_ID, "timestamp": "t", "stream": "stdout"}
    parts = [{**base, "seq": 1, "data": "one ", "continued": True}, {**base, "seq": 2, "data": "line\n"}]
    parts += [{**base, "seq": 3, "data": "no newline"}, {"type": "end", "seq": 4, "state": "completed"}]
    api.on("GET", f"/tasks/{TASK_ID}/logs", sse_response(parts))
    assert run_cli("task", "logs", TASK_ID, "-f", "--raw", "--stream", "stdout").stdout == b"one line\nno newline"


def test_followed_logs_join_parts_of_a_line(run_cli, api, task):
    base = {"type": "output", "task_id": TASK_ID, "timestamp": "t", "stream": "stdout", "continued": True}
    parts = [
        {**base, "seq": 1, "data": "one "},
        {**base, "seq": 2, "data": "line\n", "continued": False},
        {**base, "seq": 3, "data": "cut by "},
        {**base, "seq": 4, "data": "a warning\n", "stream": "stderr", "continued": False},
        {**base, "seq": 5, "data": "no end"},
        {"type": "end", "seq": 6, "state": "completed"},
    ]
    api.on("GET", f"/tasks/{TASK_ID}/logs", sse_response(parts))
    expected = b"[t] [STDOUT] one line\n[t] [STDOUT] cut by \n[t] [STDERR] a warning\n[t] [STDOUT] no end"
    assert run_cli("task", "logs", TASK_ID, "-f", "--timestamps").stdout == expected


def test_since_option_is_sent_in_utc(run_cli, api):
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, []))
    run_cli("task", "logs", TASK_ID, "--since", "2026-01-29T12:00:00+02:00")
    assert api.requests[0].query["since"] == ["2026-01-29T10:00:00.000Z"]


def test_cancel_waits_and_does_not_prompt_without_a_terminal(run_cli, api, task):
    response = {
        "success": True,
        "task_id": TASK_ID,
        "previous_state": "running",
        "new_state": "cancelled",
        "message": "m",
    }
    task("cancelled")
    api.on("DELETE", f"/tasks/{TASK_ID}", json_response(response))
    result = run_cli("task", "cancel", TASK_ID, "--reason", "too slow", "--force")
    assert (result.returncode, result.stderr) == (0, f"Task {TASK_ID} was cancelled.\n".encode())
    assert api.requests_to("DELETE", f"/tasks/{TASK_ID}")[0].query == {"reason": ["too slow"], "force": ["true"]}


def test_cancel_of_an_ended_task_exits_with_4(run_cli, api):
    api.on("DELETE", f"/tasks/{TASK_ID}", error_response(409, "task_already_terminal", "Task fix-42 is completed."))
    assert run_cli("task", "cancel", TASK_ID).returncode == 4


@pytest.fixture
def artifacts(api):
    """Two artifacts, one of which is an `.envrc` file, which direnv would execute."""
    entries = []
    for name, data in {"fix-42.patch": b"diff\n", ".envrc": b"rm -rf ~\n"}.items():
        headers = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
        api.on("GET", f"/tasks/{TASK_ID}/artifacts/{name}", ApiResponse(200, [data], headers))
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        size = {"size_bytes": len(data), "content_type": "text/plain", "checksum": checksum}
        size["contains_secret"] = name == ".envrc"
        entries.append({"name": name, "path": f"out/{name}", **size})
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/artifacts",
        json_response({"task_id": TASK_ID, "artifacts": entries, "total_count": 2}),
    )
    return entries


def test_artifacts_are_listed(run_cli, artifacts):
    lines = run_cli("task", "artifacts", TASK_ID).stdout.decode().splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["NAME", "SIZE", "TYPE", "PATH"],
        ["fix-42.patch", "5", "B", "text/plain", "out/fix-42.patch"],
    ]
    assert lines[2].endswith("(contains a secret)")


def test_artifact_is_downloaded_to_the_output_path(run_cli, artifacts, tmp_path):
    (tmp_path / "dir").mkdir()
    for output, file in ((None, "fix-42.patch"), ("other", "other"), ("dir", "dir/fix-42.patch")):
        result = run_cli("task", "download", TASK_ID, "fix-42.patch", *(["-o", output] if output else []))
        assert (result.returncode, result.stdout) == (0, b"")
        assert (tmp_path / file).read_bytes() == b"diff\n"


def test_artifact_can_be_written_to_stdout(run_cli, artifacts, tmp_path):
    result = run_cli("task", "download", TASK_ID, "fix-42.patch", "--output", "-")
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == (b"diff\n", b"", [])


def test_all_artifacts_are_saved_in_a_task_directory(run_cli, artifacts, tmp_path):
    result = run_cli("task", "download", TASK_ID, "--all", "--allow-secrets", "-f", "json")
    assert sorted(file.name for file in (tmp_path / TASK_ID).iterdir()) == [".envrc", "fix-42.patch"]
    assert [file["size_bytes"] for file in json.loads(result.stdout)["files"]] == [5, 9]
    assert not (tmp_path / ".envrc").exists()


@pytest.mark.parametrize(
    ("arguments", "link", "exit_code"), [(["--all"], TASK_ID, 5), (["fix-42.patch"], "fix-42.patch", 0)]
)
def test_download_without_output_does_not_follow_a_link(run_cli, artifacts, tmp_path, arguments, link, exit_code):
    """A patch of the agent may have added the link. With --output, the user chooses it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / link).symlink_to(outside)
    result = run_cli("task", "download", TASK_ID, *arguments)
    assert (result.returncode, list(outside.iterdir())) == (2, [])
    assert b"is a symbolic link; remove it, or choose another target with --output" in result.stderr
    assert run_cli("task", "download", TASK_ID, *arguments, "--output", f"./{link}").returncode == exit_code
    assert [file.name for file in outside.iterdir()] == ["fix-42.patch"]


@pytest.mark.parametrize(
    ("arguments", "link"),
    [
        (["--all"], f"{TASK_ID}/fix-42.patch"),
        (["--all", "--output", "results"], "results/fix-42.patch"),
        (["fix-42.patch"], "fix-42.patch/fix-42.patch"),
        (["fix-42.patch", "--output", "results"], "results/fix-42.patch"),
    ],
)
def test_download_to_a_directory_does_not_follow_links_in_it(run_cli, artifacts, tmp_path, arguments, link):
    """The link may lead to a terminal or a disk."""
    os.mkfifo(tmp_path / "device")
    (tmp_path / link).parent.mkdir()
    (tmp_path / link).symlink_to(tmp_path / "device")
    result = run_cli("task", "download", TASK_ID, *arguments)
    assert result.returncode == 2
    assert b"is a symbolic link" in result.stderr
    (tmp_path / link).unlink()
    assert run_cli("task", "download", TASK_ID, *arguments).returncode == (5 if "--all" in arguments else 0)
    assert (tmp_path / link).read_bytes() == b"diff\n"


def test_output_may_name_a_link(run_cli, artifacts, tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    assert run_cli("task", "download", TASK_ID, "fix-42.patch", "--output", "./link").returncode == 0
    assert (tmp_path / "link").read_bytes() == b"diff\n"


@pytest.mark.parametrize(("state", "message"), [("running", b"no artifacts yet"), ("failed", b"it ended without any")])
def test_download_all_without_artifacts_exits_with_3(run_cli, api, tmp_path, state, message):
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": []}))
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status(state)))
    result = run_cli("task", "download", TASK_ID, "--all")
    assert (result.returncode, list(tmp_path.iterdir())) == (3, [])
    assert message in result.stderr


@pytest.mark.parametrize("name", ["..", ".", "a/..", ""])
def test_artifact_name_cannot_traverse_directories(run_cli, api, tmp_path, name):
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"x").hexdigest()}
    entry = {"name": name, "path": name, "size_bytes": 1, "content_type": "t", "contains_secret": False, "checksum": ""}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": [entry]}))
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/{name}", ApiResponse(200, [b"x"], headers))
    assert run_cli("task", "download", TASK_ID, "--all").returncode == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_download_by_path_uses_the_requested_name(run_cli, api, tmp_path):
    entry = {"name": ".bashrc", "path": "out/report.md", "checksum": "sha256:0", "contains_secret": False}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": [entry]}))
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"report").hexdigest()}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/.bashrc", ApiResponse(200, [b"report"], headers))
    assert run_cli("task", "download", TASK_ID, "out/report.md").returncode == 0
    assert ((tmp_path / "report.md").read_bytes(), (tmp_path / ".bashrc").exists()) == (b"report", False)


@pytest.mark.parametrize("name", ["metadata.json", f"{TASK_ID}.changes.tar"])
def test_workspace_file_is_not_downloaded_as_a_generated_artifact(run_cli, api, tmp_path, name):
    entry = {"name": f"renamed-{name}", "path": name, "checksum": "", "contains_secret": False}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"artifacts": [entry]}))
    assert run_cli("task", "download", TASK_ID, name).returncode == 3
    assert not (tmp_path / name).exists()


def test_damaged_download_exits_with_10_and_leaves_no_file(run_cli, api, tmp_path):
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/a", ApiResponse(200, [b"x"], {"X-Checksum-SHA256": "0" * 64}))
    entry = {"name": "a", "path": "a", "contains_secret": False, "checksum": ""}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"artifacts": [entry]}))
    result = run_cli("task", "download", TASK_ID, "a")
    assert result.returncode == 10
    assert b"damaged" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_set_option_changes_only_the_given_fields(run_cli, task, api, manifest):
    settings = [
        "--set",
        "vm.cpus=16",
        "--set",
        "lifecycle.artifact_patterns[0]=*.md",
        "--set",
        "claude.prompt=Be: kind",
    ]
    assert run_cli("task", "submit", manifest, *settings).returncode == 0
    sent = json.loads(api.requests_to("POST", "/tasks")[0].body)
    assert (sent["vm"], sent["lifecycle"]) == ({"cpus": 16}, {"artifact_patterns": ["*.md"]})
    assert (sent["claude"], sent["repository"]["branch"]) == ({"prompt": "Be: kind"}, "main")


UNKNOWN_FIELD = "unknown field; valid fields: profile, cpus, memory, disk, network_mode, allowed_hosts"


def test_errors_include_the_set_option_or_the_file_position(run_cli, api, manifest, tmp_path):
    (tmp_path / manifest).write_bytes(MANIFEST + b"vm:\n  colour: red\n")

    def validate(request):
        try:
            parse_manifest(request.body, is_json=True)
        except InvalidManifestError as error:
            return error_response(400, "invalid_manifest", error.message, field_error_details(error.errors))

    api.on("POST", "/tasks", validate)
    result = run_cli("task", "submit", manifest, "--set", "vm.cpus=many", "--set", "vm.size=1")
    assert result.returncode == 9
    lines = result.stderr.decode().splitlines()
    assert [line.partition(" ")[2] if line.startswith("--set") else line for line in lines[:3]] == [
        "vm.cpus=many: must be a whole number, not text",
        f"task.yaml:7:3: vm.colour: is an {UNKNOWN_FIELD}",
        f"vm.size=1: {UNKNOWN_FIELD}",
    ]


def test_single_error_of_a_set_option_is_printed_on_one_line(run_cli, api, manifest):
    detail = {**FIELD_ERROR, "field": "vm.cpu", "message": "is an unknown field; did you mean 'cpus'?"}
    api.on("POST", "/tasks", error_response(400, "invalid_manifest", "The manifest has 1 error.", [detail]))
    result = run_cli("task", "submit", manifest, "--set", "vm.cpu=2")
    assert result.returncode == 9
    assert result.stderr.decode() == "Error: --set vm.cpu=2: unknown field; did you mean 'cpus'?\n"


def test_unparsable_manifest_with_set_option_is_not_sent(run_cli, api, manifest, tmp_path):
    (tmp_path / manifest).write_bytes(MANIFEST + b"kind: Task\n")
    result = run_cli("task", "submit", manifest, "--set", "vm.cpus=2")
    assert (result.returncode, api.requests) == (9, [])
    assert result.stderr.startswith(b"task.yaml:6:1: kind: appears more than once")


def test_set_option_with_a_gap_in_a_list_is_rejected_before_sending(run_cli, api, manifest):
    result = run_cli("task", "submit", manifest, "--set", "secrets[3].name=X")
    assert (result.returncode, api.requests) == (2, [])
    assert b"the next index of this list is [0]" in result.stderr


def test_submit_retries_a_lost_response_with_the_same_key(run_cli, api, manifest):
    lost_response = ApiResponse(202, [b"{"], {"Content-Length": "100"})
    api.on("POST", "/tasks", lost_response, json_response({"task_id": TASK_ID, "state": "pending"}, 202))
    assert run_cli("task", "submit", manifest).stdout == f"{TASK_ID}\n".encode()
    keys = {request.headers["idempotency-key"] for request in api.requests_to("POST", "/tasks")}
    assert (len(api.requests), len(keys)) == (2, 1)
    assert run_cli("task", "submit", manifest).returncode == 0
    assert api.requests[-1].headers["idempotency-key"] not in keys


@pytest.fixture
def state_stream(api):
    """A stream of all tasks' states with two events, then an error."""
    first = {"type": "state_change", "task_id": "a\x1b", "seq": 3, "timestamp": "2026-01-29T10:10:15.123Z"}
    first |= {"previous_state": None, "new_state": "completed", "state_message": "It is done."}
    end = {"type": "end", "task_id": "a\x1b", "seq": 4, "timestamp": "2026-01-29T10:10:15.123Z"}
    end |= {"state": "completed", "exit_code": 0, "error": None}
    text = f"id: c0-1\n\ndata: {json.dumps(first)}\n\nid: c0-2\ndata: {json.dumps(end)}\n\n"
    streamed = ApiResponse(200, [text.encode()], {"Content-Type": "text/event-stream"})
    api.on("GET", "/events", streamed, error_response(403, "forbidden", "The token was removed."))
    return [{**first, "position": "c0-1"}, {**end, "position": "c0-2"}]


def test_watch_prints_the_states_of_all_tasks(run_cli, api, state_stream):
    result = run_cli("task", "watch")
    _, line = result.stdout.decode().splitlines()  # the first line has the date
    assert line.split()[-5:] == ["completed", "a\\x1b", "It", "is", "done."]
    assert (result.returncode, b"The token was removed." in result.stderr) == (5, True)


def test_watch_prints_events_with_their_positions_as_json(run_cli, api, state_stream):
    result = run_cli("task", "watch", "--after", "c0-0", "--format", "json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == state_stream
    sent = [request.headers.get("last-event-id") for request in api.requests_to("GET", "/events")]
    assert sent == ["c0-0", "c0-2"]


def test_release_prints_the_message_of_the_server(run_cli, api):
    response = {"success": True, "task_id": TASK_ID, "message": "Released."}
    api.on("DELETE", f"/tasks/{TASK_ID}/vm", json_response(response))
    assert run_cli("task", "release", TASK_ID).stderr == b"Released.\n"
    assert json.loads(run_cli("task", "release", TASK_ID, "-f", "json").stdout) == response
    assert run_cli("task", "release", "other").returncode == 3


def test_delete_prints_the_message_of_the_server(run_cli, api):
    response = {"success": True, "task_id": TASK_ID, "message": "Deleted."}
    api.on("DELETE", f"/tasks/{TASK_ID}/data", json_response(response))
    assert run_cli("task", "delete", TASK_ID, "--yes").stderr == b"Deleted.\n"
    assert json.loads(run_cli("task", "delete", TASK_ID, "-y", "-f", "json").stdout) == response
    assert run_cli("task", "delete", "other", "--yes").returncode == 3


@pytest.mark.parametrize("options", [[], ["-f", "json"]])
def test_delete_without_a_terminal_needs_the_yes_option(run_cli, api, options):
    result = run_cli("task", "delete", TASK_ID, *options)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"add --yes" in result.stderr
    assert api.requests_to("DELETE", f"/tasks/{TASK_ID}/data") == []


@pytest.mark.parametrize(("answer", "released_count"), [("n", 0), ("y", 1)])
def test_release_asks_on_a_terminal(api, on_terminal, terminal, answer, released_count):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed_preserved", name="Fix it")))
    response = {"success": True, "task_id": TASK_ID, "message": "Released."}
    api.on("DELETE", f"/tasks/{TASK_ID}/vm", json_response(response))
    process = on_terminal("task", "release", TASK_ID)
    question = terminal.read_until(b"[y/N]: ").decode()
    assert question == f"Remove the preserved sandbox of task {TASK_ID} (Fix it)? [y/N]: "
    terminal.type(f"{answer}\n".encode())
    text = terminal.read_to_end(process).decode()
    assert ("Released." in text, "The sandbox was not removed." in text) == (released_count == 1, released_count == 0)
    assert len(api.requests_to("DELETE", f"/tasks/{TASK_ID}/vm")) == released_count
    assert "[y/N]" not in terminal.read_to_end(on_terminal("task", "release", TASK_ID, "-y")).decode()


@pytest.mark.parametrize(("answer", "deleted_count"), [("n", 0), ("y", 1)])
def test_delete_asks_once_for_several_tasks(api, on_terminal, terminal, answer, deleted_count):
    for task_id in ("first", "last"):
        api.on(
            "GET", f"/tasks/{task_id}", json_response(task_status("failed") | {"id": task_id, "name": f"The {task_id}"})
        )
        response = {"success": True, "task_id": task_id, "message": "Done."}
        api.on("DELETE", f"/tasks/{task_id}/data", json_response(response))
    process = on_terminal("task", "delete", "first", "last")
    question = terminal.read_until(b"[y/N]: ").decode().replace("\r", "")
    assert question == "  first (The first)\n  last (The last)\nDelete these 2 tasks and all their data? [y/N]: "
    terminal.type(f"{answer}\n".encode())
    text = terminal.read_to_end(process).decode().replace("\r", "")
    assert "[y/N]" not in text
    counts = [len(api.requests_to("DELETE", f"/tasks/{task_id}/data")) for task_id in ("first", "last")]
    assert counts == [deleted_count] * 2
    assert ("No task was deleted." in text) == (deleted_count == 0)


@pytest.mark.parametrize(("command", "resource", "options"), [("delete", "data", ["--yes"]), ("release", "vm", [])])
def test_command_for_several_tasks_continues_after_an_error(run_cli, api, command, resource, options):
    for task_id in ("first", "last"):
        response = {"success": True, "task_id": task_id, "message": "Done."}
        api.on("DELETE", f"/tasks/{task_id}/{resource}", json_response(response))
    result = run_cli("task", command, "first", "other", "last", "first", *options)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, lines[0], lines[-1]) == (3, "first: Done.", "last: Done.")
    assert len(api.requests_to("DELETE", f"/tasks/first/{resource}")) == 1
    result = run_cli("task", command, "first", "last", "-f", "json", *options)
    assert (result.returncode, result.stdout.count(b'"task_id"')) == (0, 2)
    assert run_cli("task", command).returncode == 2


def test_message_that_contains_the_id_is_printed_without_a_prefix(run_cli, api):
    for task_id in ("first", "last"):
        response = {"success": True, "task_id": task_id, "message": f"Task {task_id} was deleted."}
        api.on("DELETE", f"/tasks/{task_id}/data", json_response(response))
    result = run_cli("task", "delete", "first", "last", "--yes")
    assert result.stderr == b"Task first was deleted.\nTask last was deleted.\n"


@pytest.fixture
def cancellable(api):
    """Make the server accept the cancellation of these tasks."""

    def accept(*task_ids):
        for task_id in task_ids:
            status = task_status("running") | {"id": task_id, "name": f"The {task_id}"}
            api.on("GET", f"/tasks/{task_id}", json_response(status))
            api.on("GET", f"/tasks/{task_id}/wait", json_response({**status, "state": "cancelled"}))
            body = {"success": True, "task_id": task_id, "previous_state": "running", "new_state": "cancelled"}
            api.on("DELETE", f"/tasks/{task_id}", json_response({**body, "message": "Cancelling.", "cancelled_at": ""}))

    return accept


def test_cancel_requests_the_end_of_all_tasks_before_it_waits(run_cli, api, cancellable):
    cancellable("first", "last")
    result = run_cli("task", "cancel", "first", "last", "first", "--reason", "too slow")
    assert (result.returncode, result.stderr) == (0, b"Task first was cancelled.\nTask last was cancelled.\n")
    methods = [request.method for request in api.requests if request.path.startswith("/tasks/")]
    assert methods == sorted(methods)
    assert methods.count("DELETE") == 2
    result = run_cli("task", "cancel", "first", "last", "-f", "json")
    assert (result.returncode, result.stdout.count(b'"task_id"')) == (0, 2)


def test_cancel_of_several_tasks_continues_after_an_error(run_cli, api, cancellable):
    cancellable("first", "last")
    api.on("DELETE", "/tasks/ended", error_response(409, "task_already_terminal", "Task ended is completed."))
    result = run_cli("task", "cancel", "first", "ended", "last")
    assert result.returncode == 4
    assert result.stderr.decode().splitlines() == [
        "Error: Task ended is completed.",
        "Task first was cancelled.",
        "Task last was cancelled.",
    ]


@pytest.mark.parametrize(("answer", "count"), [("n", 0), ("y", 1)])
def test_cancel_asks_once_for_several_tasks(api, cancellable, on_terminal, terminal, answer, count):
    cancellable("first", "last")
    process = on_terminal("task", "cancel", "first", "last")
    question = terminal.read_until(b"[y/N]: ").decode().replace("\r", "")
    assert question == "  first (The first)\n  last (The last)\nCancel these 2 tasks? [y/N]: "
    terminal.type(f"{answer}\n".encode())
    text = terminal.read_to_end(process).decode()
    assert ("[y/N]" in text, "No task was cancelled." in text) == (False, count == 0)
    assert [len(api.requests_to("DELETE", f"/tasks/{task_id}")) for task_id in ("first", "last")] == [count] * 2


def test_cancel_on_a_terminal_shows_how_long_the_agent_may_take(api, on_terminal, terminal, task):
    task("cancelled")
    response = {"success": True, "task_id": TASK_ID, "previous_state": "running", "message": "Stopping."}
    api.on("DELETE", f"/tasks/{TASK_ID}", json_response(response))
    bound = "Stopping. The agent has up to 30 s to exit (--force skips this)."
    terminal.resize(120)
    text = terminal.read_to_end(on_terminal("task", "cancel", TASK_ID, "-y")).decode()
    assert bound in text
    text = terminal.read_to_end(on_terminal("task", "cancel", TASK_ID, "-y", "--force")).decode()
    assert ("Stopping." in text, "30 s" in text) == (True, False)


@pytest.mark.parametrize("command", ["cancel", "delete", "release"])
def test_command_for_several_tasks_suggests_a_similar_id_for_an_unknown_one(run_cli, api, command):
    options = ["--yes"] if command == "delete" else []
    path = {"cancel": "", "delete": "/data", "release": "/vm"}[command]
    api.on("DELETE", f"/tasks/fix-baskt{path}", NOT_FOUND)
    page = {"tasks": [task_status("completed", "fix-basket")], "total_count": 1, "next_cursor": None}
    api.on("GET", "/tasks", json_response(page))
    result = run_cli("task", command, "fix-baskt", *options)
    message = "Error: There is no task 'fix-baskt'. Did you mean fix-basket?\n  List the tasks: sandbox task list\n"
    assert (result.returncode, result.stderr.decode()) == (3, message)


def test_list_explains_how_to_search_for_words(run_cli, api):
    result = run_cli("task", "list", "flaky", "login", "--limit", "3")
    assert (result.returncode, api.requests_to("GET", "/tasks")) == (2, [])
    assert b"sandbox task list -q 'flaky login'" in result.stderr


def test_delete_of_a_task_that_has_not_ended_exits_with_4(run_cli, api):
    api.on("DELETE", f"/tasks/{TASK_ID}/data", error_response(409, "task_not_ended", "Cancel it, then delete it."))
    result = run_cli("task", "delete", TASK_ID, "--yes")
    assert (result.returncode, b"Cancel it, then delete it." in result.stderr) == (4, True)
    assert result.stderr.endswith(f"\n  Cancel it: sandbox task cancel {TASK_ID}\n".encode())


def test_json_logs_are_lines_of_events(run_cli, api):
    event = {"type": "tool_call", "task_id": TASK_ID, "seq": 3, "timestamp": "t", "tool": "Bash"}
    line = b"[t] [EVENT] " + json.dumps(event).encode() + b"\n"
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [LOG, line, b"[t] [EVENT] not json\n", b"odd\n"]))
    events = [json.loads(line) for line in run_cli("task", "logs", TASK_ID, "--format", "json").stdout.splitlines()]
    assert [item["type"] for item in events] == ["output", "output", "tool_call"]
    assert events[1] == {
        "type": "output",
        "task_id": TASK_ID,
        "timestamp": "2026-01-29T10:10:15.124Z",
        "stream": "stderr",
        "data": "oh [x] y\n",
    }
    assert events[2] == event


def test_artifact_with_a_secret_needs_the_allow_secrets_option(run_cli, artifacts, tmp_path):
    for name in (".envrc", "out/.envrc"):
        result = run_cli("task", "download", TASK_ID, name)
        assert (result.returncode, list(tmp_path.iterdir())) == (5, [])
        assert b"add --allow-secrets" in result.stderr
    assert run_cli("task", "download", TASK_ID, ".envrc", "-o", "-").stdout == b""
    result = run_cli("task", "download", TASK_ID, "--all")
    assert (result.returncode, [file.name for file in (tmp_path / TASK_ID).iterdir()]) == (5, ["fix-42.patch"])
    assert run_cli("task", "download", TASK_ID, "out/.envrc", "--allow-secrets").returncode == 0
    assert (tmp_path / ".envrc").read_bytes() == b"rm -rf ~\n"


def test_verify_prints_the_checksums_of_the_files(run_cli, artifacts, tmp_path):
    result = run_cli("task", "download", TASK_ID, "--all", "--verify", "--allow-secrets")
    digest = hashlib.sha256(b"diff\n").hexdigest()
    assert result.returncode == 0
    assert result.stderr.splitlines()[0] == f"fix-42/fix-42.patch  5 B  sha256:{digest}".encode()


def test_verify_needs_a_regular_output_file(run_cli, artifacts, api):
    result = run_cli("task", "download", TASK_ID, "fix-42.patch", "-o", "/dev/full", "--verify")
    assert (result.returncode, api.requests_to("GET", f"/tasks/{TASK_ID}/artifacts/fix-42.patch")) == (2, [])
    assert b"--verify" in result.stderr


def test_verify_detects_a_checksum_mismatch(run_cli, api, artifacts):
    entries = [{**entry, "checksum": "sha256:" + "0" * 64} for entry in artifacts]
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": entries}))
    assert run_cli("task", "download", TASK_ID, "fix-42.patch", "--verify").returncode == 10


def test_missing_artifact_exits_with_3(run_cli, artifacts):
    result = run_cli("task", "download", TASK_ID, "report.md")
    assert result.returncode == 3
    assert b"sandbox task artifacts fix-42" in result.stderr


def test_list_with_all_option_joins_the_pages(run_cli, api):
    first = {"tasks": [task_status("running", task_id="a")], "total_count": 2, "has_more": True, "next_cursor": "c"}
    second = {"tasks": [task_status("running", task_id="b")], "total_count": 2, "has_more": False, "next_cursor": None}
    pages = {None: first, "c": second}
    api.on("GET", "/tasks", lambda request: json_response(pages[request.query.get("cursor", [None])[0]]))
    result = run_cli("task", "list", "--all", "--state", "running")
    assert [line.split()[0] for line in result.stdout.decode().splitlines()] == ["ID", "a", "b"]
    assert result.stderr == b""
    document = json.loads(run_cli("task", "list", "--all", "-f", "json").stdout)
    assert [task["id"] for task in document["tasks"]] == ["a", "b"]
    assert (document["has_more"], document["next_cursor"]) == (False, None)
    assert api.requests[1].query == {"state": ["running"], "limit": ["1000"], "cursor": ["c"]}


def test_truncated_list_suggests_the_options_limit_and_all(run_cli, api):
    api.on("GET", "/tasks", json_response({"tasks": [task_status("running")], "total_count": 7}))
    assert run_cli("task", "list").stderr == b"1 of 7 tasks; see more with --limit, or --all.\n"


@pytest.mark.parametrize("command", [("list",), ("submit", "task.yaml"), ("status", TASK_ID)])
def test_token_with_a_line_ending_is_a_usage_error(run_cli, environment, api, manifest, command):
    environment["SANDBOX_TOKEN"] = "secret-token\r"
    result = run_cli("task", *command)
    assert (result.returncode, api.requests) == (2, [])
    assert b"The token (--token, SANDBOX_TOKEN)" in result.stderr
    assert b"secret-token" not in result.stderr


FOREIGN = {"hello": "world"}
WRONG_TYPES = task_status("running", created_at=5, progress={"turns": "many"})


@pytest.mark.parametrize(
    ("arguments", "method", "path", "response"),
    [
        (("task", "submit", "task.yaml"), "POST", "/tasks", FOREIGN),
        (("task", "submit", "task.yaml", "-f", "json"), "POST", "/tasks", FOREIGN),
        (("task", "wait", TASK_ID), "GET", f"/tasks/{TASK_ID}", FOREIGN),
        (("task", "status", TASK_ID), "GET", f"/tasks/{TASK_ID}", WRONG_TYPES),
        (("task", "status", TASK_ID), "GET", f"/tasks/{TASK_ID}", {"id": TASK_ID, "state": "running"}),
        (("task", "list"), "GET", "/tasks", {"tasks": [{}], "total_count": 1}),
        (("task", "artifacts", TASK_ID), "GET", f"/tasks/{TASK_ID}/artifacts", {"artifacts": [{"name": "a"}]}),
        (("task", "cancel", TASK_ID), "DELETE", f"/tasks/{TASK_ID}", FOREIGN),
        (("admin", "drain"), "POST", "/admin/drain", {"draining": True}),
        (("admin", "prune", "--yes", "--keep", "1"), "POST", "/admin/prune", {"tasks": [{"id": "a"}]}),
    ],
)
def test_malformed_response_is_reported_in_one_message(run_cli, api, manifest, arguments, method, path, response):
    api.on(method, path, json_response(response))
    result = run_cli(*arguments)
    assert result.returncode == 10
    assert b"Check the address of the server" in result.stderr
    assert b"Traceback" not in result.stderr


NOT_FOUND = error_response(404, "task_not_found", "There is no task 'fix-baskt'; list the tasks to see their ids.")


@pytest.mark.parametrize(
    ("ids", "question"), [(["fix-1", "fix-basket"], " Did you mean fix-basket?"), (["other"], ""), ([], "")]
)
def test_error_about_an_unknown_id_suggests_a_similar_id_and_the_list_command(run_cli, api, ids, question):
    api.on("GET", "/tasks/fix-baskt", NOT_FOUND)
    page = {"tasks": [task_status("completed", one) for one in ids], "total_count": len(ids), "next_cursor": None}
    api.on("GET", "/tasks", json_response(page) if ids else error_response(500, "internal_error", "Broken."))
    result = run_cli("task", "status", "fix-baskt")
    expected = f"Error: There is no task 'fix-baskt'.{question}\n  List the tasks: sandbox task list\n"
    assert (result.returncode, result.stderr.decode()) == (3, expected)


@pytest.mark.parametrize("command", ["status", "logs", "wait", "cancel", "delete", "artifacts", "diff"])
def test_invalid_id_is_rejected_before_sending(run_cli, api, command):
    confirmation = ["-y"] if command in {"cancel", "delete"} else []
    empty = run_cli("task", command, "", *confirmation)
    assert (empty.returncode, empty.stderr) == (2, b"Error: The id of a task must not be empty.\n")
    other = run_cli("task", command, f"{TASK_ID}/vm", *confirmation)
    assert (other.returncode, other.stderr) == (3, b"Error: There is no task 'fix-42/vm'; ids contain no slashes.\n")
    assert api.requests == []


@pytest.mark.parametrize(
    ("command", "method", "path"),
    [
        (("task", "list"), "GET", "/tasks"),
        (("task", "status", TASK_ID), "GET", f"/tasks/{TASK_ID}"),
        (("task", "cancel", TASK_ID, "-y"), "DELETE", f"/tasks/{TASK_ID}"),
        (("admin", "drain"), "POST", "/admin/drain"),
    ],
)
def test_server_without_the_api_is_reported(run_cli, api, command, method, path):
    api.on(method, path, error_response(404, "not_found", "Page not found."))
    result = run_cli(*command)
    assert result.returncode == 10
    assert b"Check the address of the server" in result.stderr


def test_missing_output_directory_is_reported(run_cli, artifacts):
    result = run_cli("task", "download", TASK_ID, "fix-42.patch", "-o", "nowhere/x.patch")
    assert result.returncode == 2
    assert b"There is no directory nowhere" in result.stderr
