"""The commands of `sandbox task` as a user or a script runs them: stdout, stderr and exit codes."""

import hashlib
import json

import pytest

from doubles.recorded_api import Answer, of_error, of_frames, of_json
from doubles.recorded_task import TASK, frames, status
from sandbox.cli.manifest_file import field_error_details
from sandbox.model.manifest.parser import InvalidManifestError, parse_manifest

MANIFEST = b"""\
version: "1"
kind: Task
metadata: {name: "Fix bug #42"}
repository: {url: "https://github.com/org/app.git", branch: main}
claude: {prompt: "Fix it"}
"""
MISTAKE = {"field": "vm.memory", "rule": "format", "message": "must be a size", "line": 12, "column": 3}


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "task.yaml").write_bytes(MANIFEST)
    return "task.yaml"


@pytest.fixture
def task(api):
    """An API with one task; call it with the final state."""

    def end_as(state: str) -> None:
        submitted = {"task_id": TASK, "state": "pending", "message": "", "created_at": "", "links": {}}
        api.on("POST", "/tasks", of_json(submitted, 202))
        api.on("GET", f"/tasks/{TASK}", of_json(status("running")), of_json(status(state)))
        api.on("GET", f"/tasks/{TASK}/wait", of_json(status(state)))
        api.on("GET", f"/tasks/{TASK}/logs", lambda asked: of_frames(frames()) if "follow" in asked.query else Answer())

    end_as("completed")
    return end_as


def test_submit_prints_the_id_and_nothing_else_on_stdout(sandbox, task, api, manifest):
    result = sandbox("task", "submit", manifest)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{TASK}\n".encode(), b"")
    assert api.to("POST", "/tasks")[0].body == MANIFEST


def test_submit_reads_stdin(sandbox, task, api):
    assert sandbox("task", "submit", "-", stdin=MANIFEST).returncode == 0
    assert sandbox("task", "submit", "-", stdin=b'{"version": "1"}').returncode == 0
    kinds = [asked.headers["content-type"] for asked in api.to("POST", "/tasks")]
    assert kinds == ["application/yaml", "application/json"]


def test_submit_gives_the_task_the_id_that_was_asked_for(sandbox, task, api, manifest):
    assert sandbox("task", "submit", manifest, "--id", "mine-1").returncode == 0
    sent = json.loads(api.to("POST", "/tasks")[0].body)
    assert sent["metadata"] == {"name": "Fix bug #42", "id": "mine-1"}
    assert sent["claude"]["prompt"] == "Fix it"


def test_the_manifest_with_another_id_is_still_one_that_the_server_takes(sandbox, task, api, manifest):
    from sandbox.model.manifest.parser import parse_manifest

    sandbox("task", "submit", manifest, "--id", "mine-1")
    body = api.to("POST", "/tasks")[0].body
    assert parse_manifest(body, is_json=True).metadata.id == "mine-1"


@pytest.mark.parametrize("how", ["--wait", "-w", "--follow"])
@pytest.mark.parametrize(
    ("state", "code"), [("completed", 0), ("failed", 1), ("failed_preserved", 1), ("cancelled", 8)]
)
def test_a_script_learns_from_the_exit_code_how_the_task_went(sandbox, task, manifest, how, state, code):
    task(state)
    result = sandbox("task", "submit", manifest, how)
    assert result.returncode == code
    assert result.stdout == f"{TASK}\n".encode()


def test_a_failure_says_why_and_how_to_look_into_a_preserved_sandbox_and_let_it_go(sandbox, task, api, manifest):
    error = {"code": "timeout", "message": "It took \x1b[31m too long."}
    api.on("GET", f"/tasks/{TASK}", of_json(status("failed_preserved", error=error)))
    result = sandbox("task", "wait", TASK)
    assert (result.returncode, result.stdout) == (1, b"failed_preserved\n")
    assert result.stderr.decode().splitlines() == [
        r"Task fix-42 failed: It took \x1b[31m too long. (timeout)",
        "  See what happened: sandbox task logs fix-42",
        "  Its sandbox is kept.",
        "  Look into it:      sandbox task shell fix-42",
        "  Remove it:         sandbox task release fix-42",
    ]


def test_follow_tells_the_story_without_colour_off_a_terminal(sandbox, task, manifest):
    result = sandbox("task", "submit", manifest, "--follow")
    assert b"running       Claude Code is working\n" in result.stderr
    assert b"\x1b" not in result.stderr


def test_follow_in_json_gives_every_event_as_a_line(sandbox, task, manifest):
    result = sandbox("task", "submit", manifest, "--follow", "-f", "json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == frames()


def test_mistakes_of_the_manifest_are_told_with_their_places(sandbox, api, manifest):
    api.on("POST", "/tasks", of_error(400, "invalid_manifest", "The manifest has 1 mistake.", [MISTAKE]))
    result = sandbox("task", "submit", manifest)
    assert result.returncode == 9
    assert result.stderr == b"task.yaml:12:3: vm.memory: must be a size\nError: task.yaml has 1 mistake.\n"


def test_validate_takes_files_of_editors_that_mark_their_byte_order(sandbox, tmp_path):
    data = {"version": "1", "kind": "Task", "metadata": {"name": "n"}, "claude": {"prompt": "p"}}
    data["repository"] = {"url": "https://example.org/r.git", "branch": "main"}
    for name in ("task.yaml", "task.json", "task"):
        (tmp_path / name).write_text(json.dumps(data, indent="\t"), encoding="utf-8-sig")
        checked = sandbox("task", "validate", name)
        assert checked.returncode == 0, checked.stderr


def test_validate_works_without_a_server(sandbox, api, manifest, tmp_path):
    assert sandbox("task", "validate", manifest).returncode == 0
    (tmp_path / "bad.yaml").write_bytes(MANIFEST + b"vm: {memory: lots}\n")
    result = sandbox("task", "validate", "bad.yaml")
    assert result.returncode == 9
    assert result.stdout.startswith(b"bad.yaml:6:14: vm.memory: must be ")
    in_json = json.loads(sandbox("task", "validate", "bad.yaml", "-f", "json").stdout)
    assert (in_json["valid"], in_json["details"][0]["field"]) == (False, "vm.memory")
    assert api.asked == []


@pytest.mark.parametrize(
    ("http_status", "error", "code"),
    [
        (400, "invalid_parameter", 2),
        (401, "unauthorized", 5),
        (403, "forbidden", 5),
        (404, "task_not_found", 3),
        (409, "task_already_terminal", 4),
        (429, "rate_limit_exceeded", 10),
        (500, "internal_error", 10),
        (503, "service_unavailable", 10),
        (507, "insufficient_resources", 10),
    ],
)
def test_every_refusal_has_its_exit_code_and_its_sentence(sandbox, api, http_status, error, code):
    api.on("GET", f"/tasks/{TASK}", of_error(http_status, error, "So it is \x1b[31m."))
    result = sandbox("task", "status", TASK)
    assert (result.returncode, result.stdout) == (code, b"")
    assert result.stderr == b"Error: So it is \\x1b[31m.\n"


def test_an_unreachable_server_ends_with_6_and_says_what_to_do(sandbox):
    result = sandbox("task", "list", "--server", "http://127.0.0.1:9")
    assert result.returncode == 6
    assert b"Start it with: sandbox serve" in result.stderr


def test_status_shows_the_task(sandbox, api):
    api.on("GET", f"/tasks/{TASK}", of_json(status("failed")))
    result = sandbox("task", "status", TASK)
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[:3] == ["Task        fix-42", "Name        Fix bug #42", "State       failed  Claude Code is working"]
    assert lines[-1] == "Error       Claude Code exited with 1. (agent_failed)"
    assert json.loads(sandbox("task", "status", TASK, "--format", "json").stdout) == status("failed")


@pytest.mark.parametrize(
    ("runtime", "tier", "told"),
    [("gvisor", "gvisor", "gvisor · agentic-dev"), ("qemu", "vm", "qemu · vm · agentic-dev")],
)
def test_the_sandbox_is_told_without_saying_a_thing_twice(sandbox, api, runtime, tier, told):
    vm = {"runtime": runtime, "tier": tier, "profile": "agentic-dev"}
    api.on("GET", f"/tasks/{TASK}", of_json(status("running", vm=vm)))
    assert f"Sandbox     {told}\n" in sandbox("task", "status", TASK).stdout.decode()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_sandbox_is_offered_for_release_while_it_is_kept(sandbox, api, is_kept):
    api.on("GET", f"/tasks/{TASK}", of_json(status("failed_preserved", sandbox_kept=is_kept)))
    told = sandbox("task", "status", TASK).stdout.decode() + sandbox("task", "wait", TASK).stderr.decode()
    assert told.count(f"sandbox task release {TASK}") == 2 * is_kept
    assert told.count(f"sandbox task shell {TASK}") == is_kept


def test_watching_a_task_tells_its_story_and_ends_with_it(sandbox, task):
    result = sandbox("task", "status", TASK, "--watch")
    assert result.returncode == 0
    assert b"completed     Claude Code finished its work\n" in result.stdout


def test_a_watch_that_begins_late_tells_all_states_and_nothing_twice(sandbox, api):
    story = frames()
    now = next(at for at, frame in enumerate(story) if frame["type"] == "usage") + 1
    past = [frame for frame in story[:now] if frame["type"] != "output"]
    lines = [f"[t] [EVENT] {json.dumps(frame)}\n".encode() for frame in past]
    asked_after = []

    def logs(asked):
        if "follow" not in asked.query:
            return Answer(200, lines)
        asked_after.append(int(asked.query["after"][0]))
        return of_frames([frame for frame in story if frame["seq"] > asked_after[0]])

    api.on("GET", f"/tasks/{TASK}", of_json(status("running")))
    api.on("GET", f"/tasks/{TASK}/logs", logs)
    told = sandbox("task", "status", TASK, "--watch").stdout.decode()
    states = [line.split()[1] for line in told.splitlines() if line[2:3] == ":"]
    assert states == [
        *[f["new_state"] for f in story if f["type"] == "state_change"][:5],
        "Refused",
        "completing",
        "completed",
        "27",
    ]
    assert "4 tool calls · 26,911 tokens in, 590 out" in told
    assert asked_after == [5]  # so that a call which began before the last event is known


def test_watching_a_task_that_has_ended_shows_how(sandbox, api):
    api.on("GET", f"/tasks/{TASK}", of_json(status("completed")))
    assert b"State       completed" in sandbox("task", "status", TASK, "-w").stdout


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("cancelled", 8), ("running", 7)])
def test_wait_prints_the_state_that_it_ended_with(sandbox, task, state, code):
    task(state)
    result = sandbox("task", "wait", TASK, "--timeout", "1s")
    assert (result.returncode, result.stdout) == (code, f"{state}\n".encode())


@pytest.mark.parametrize("arguments", [[], ["--format", "table"]])
def test_lists_never_shorten_ids(sandbox, api, arguments):
    task_id = "x" * 128
    tasks = [status("running", task_id=task_id, name="n" * 256), status("failed")]
    api.on("GET", "/tasks", of_json({"tasks": tasks, "total_count": 7}))
    result = sandbox("task", "list", *arguments)
    assert task_id.encode() in result.stdout
    assert b"n" * 256 in result.stdout
    assert result.stderr == b"2 of 7 tasks; see more with --limit, or --all.\n"


def test_lists_are_narrowed_down(sandbox, api):
    api.on("GET", "/tasks", of_json({"tasks": [], "total_count": 0}))
    result = sandbox("task", "list", "--state", "running", "--label", "team=platform", "--limit", "5")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"No such tasks.\n")
    expected = {"state": ["running"], "label.team": ["platform"], "limit": ["5"]}
    assert api.asked[0].query == expected


LOG = b'[2026-01-29T10:10:15.123Z] [STDOUT] {"raw": "\x1b[31m\xff"}\n[2026-01-29T10:10:15.124Z] [STDERR] oh [x] y\n'


def test_logs_off_a_terminal_pass_the_bytes_as_they_came(sandbox, api):
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, [LOG[:40], LOG[40:]]))
    assert sandbox("task", "logs", TASK, "--timestamps").stdout == LOG
    assert sandbox("task", "logs", TASK).stdout == b'[STDOUT] {"raw": "\x1b[31m\xff"}\n[STDERR] oh [x] y\n'
    assert sandbox("task", "logs", TASK, "--stream", "stdout", "--tail", "5").stdout.startswith(
        b'{"raw": "\x1b[31m\xff"}\n'
    )
    assert api.asked[-1].query == {"stream": ["stdout"], "tail": ["5"]}


def test_followed_logs_look_like_the_others_and_end_with_the_task(sandbox, task):
    result = sandbox("task", "logs", TASK, "--follow")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith('[EVENT] {"type":"state_change","task_id":"fix-42","seq":1,')
    assert lines[5].startswith('[STDOUT] {"type": "system"')
    assert len(lines) == len(frames()) - 1


def test_a_followed_stream_is_joined_to_the_bytes_that_it_was(sandbox, api, task):
    base = {"type": "output", "task_id": TASK, "timestamp": "t", "stream": "stdout"}
    parts = [{**base, "seq": 1, "data": "one ", "continued": True}, {**base, "seq": 2, "data": "line\n"}]
    parts += [{**base, "seq": 3, "data": "no newline"}, {"type": "end", "seq": 4, "state": "completed"}]
    api.on("GET", f"/tasks/{TASK}/logs", of_frames(parts))
    assert sandbox("task", "logs", TASK, "-f", "--stream", "stdout").stdout == b"one line\nno newline"


def test_a_followed_line_that_came_in_parts_is_one_line(sandbox, api, task):
    base = {"type": "output", "task_id": TASK, "timestamp": "t", "stream": "stdout", "continued": True}
    parts = [
        {**base, "seq": 1, "data": "one "},
        {**base, "seq": 2, "data": "line\n", "continued": False},
        {**base, "seq": 3, "data": "cut by "},
        {**base, "seq": 4, "data": "a warning\n", "stream": "stderr", "continued": False},
        {**base, "seq": 5, "data": "no end"},
        {"type": "end", "seq": 6, "state": "completed"},
    ]
    api.on("GET", f"/tasks/{TASK}/logs", of_frames(parts))
    told = b"[t] [STDOUT] one line\n[t] [STDOUT] cut by \n[t] [STDERR] a warning\n[t] [STDOUT] no end"
    assert sandbox("task", "logs", TASK, "-f", "--timestamps").stdout == told


def test_logs_since_a_while_ago_are_asked_for_by_time(sandbox, api):
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, []))
    sandbox("task", "logs", TASK, "--since", "2026-01-29T12:00:00+02:00")
    assert api.asked[0].query["since"] == ["2026-01-29T10:00:00.000Z"]


def test_cancel_waits_for_the_end_and_does_not_ask_a_script(sandbox, api, task):
    answer = {"success": True, "task_id": TASK, "previous_state": "running", "new_state": "cancelled", "message": "m"}
    task("cancelled")
    api.on("DELETE", f"/tasks/{TASK}", of_json(answer))
    result = sandbox("task", "cancel", TASK, "--reason", "too slow", "--force")
    assert (result.returncode, result.stderr) == (0, f"Task {TASK} was cancelled.\n".encode())
    assert api.to("DELETE", f"/tasks/{TASK}")[0].query == {"reason": ["too slow"], "force": ["true"]}


def test_cancel_of_a_task_that_has_ended_is_a_conflict(sandbox, api):
    api.on("DELETE", f"/tasks/{TASK}", of_error(409, "task_already_terminal", "Task fix-42 is completed."))
    assert sandbox("task", "cancel", TASK).returncode == 4


@pytest.fixture
def artifacts(api):
    """Two artifacts, one with a name that a shell would obey."""
    entries = []
    for name, data in {"fix-42.patch": b"diff\n", ".envrc": b"rm -rf ~\n"}.items():
        headers = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
        api.on("GET", f"/tasks/{TASK}/artifacts/{name}", Answer(200, [data], headers))
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        size = {"size_bytes": len(data), "content_type": "text/plain", "checksum": checksum}
        size["contains_secret"] = name == ".envrc"
        entries.append({"name": name, "path": f"out/{name}", **size})
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": entries, "total_count": 2}))
    return entries


def test_artifacts_are_listed(sandbox, artifacts):
    lines = sandbox("task", "artifacts", TASK).stdout.decode().splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["NAME", "SIZE", "TYPE", "PATH"],
        ["fix-42.patch", "5", "B", "text/plain", "out/fix-42.patch"],
    ]
    assert lines[2].endswith("(contains a secret)")


def test_an_artifact_is_downloaded_to_where_it_was_asked(sandbox, artifacts, tmp_path):
    (tmp_path / "dir").mkdir()
    for output, file in ((None, "fix-42.patch"), ("other", "other"), ("dir", "dir/fix-42.patch")):
        result = sandbox("task", "download", TASK, "fix-42.patch", *(["-o", output] if output else []))
        assert (result.returncode, result.stdout) == (0, b"")
        assert (tmp_path / file).read_bytes() == b"diff\n"


def test_an_artifact_is_piped_on(sandbox, artifacts, tmp_path):
    result = sandbox("task", "download", TASK, "fix-42.patch", "--output", "-")
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == (b"diff\n", b"", [])


def test_all_artifacts_go_into_a_directory_of_their_own(sandbox, artifacts, tmp_path):
    result = sandbox("task", "download", TASK, "--all", "--allow-secrets", "-f", "json")
    assert sorted(file.name for file in (tmp_path / TASK).iterdir()) == [".envrc", "fix-42.patch"]
    assert [file["size_bytes"] for file in json.loads(result.stdout)["files"]] == [5, 9]
    assert not (tmp_path / ".envrc").exists()


@pytest.mark.parametrize(("state", "words"), [("running", b"no artifacts yet"), ("failed", b"it ended without any")])
def test_where_there_are_no_artifacts_all_of_them_are_not_found(sandbox, api, tmp_path, state, words):
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": []}))
    api.on("GET", f"/tasks/{TASK}", of_json(status(state)))
    result = sandbox("task", "download", TASK, "--all")
    assert (result.returncode, list(tmp_path.iterdir())) == (3, [])
    assert words in result.stderr


@pytest.mark.parametrize("name", ["..", ".", "a/..", ""])
def test_a_name_that_leads_out_of_the_directory_is_not_written(sandbox, api, tmp_path, name):
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"x").hexdigest()}
    entry = {"name": name, "path": name, "size_bytes": 1, "content_type": "t", "contains_secret": False, "checksum": ""}
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": [entry]}))
    api.on("GET", f"/tasks/{TASK}/artifacts/{name}", Answer(200, [b"x"], headers))
    assert sandbox("task", "download", TASK, "--all").returncode == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_what_is_asked_for_by_its_path_is_called_as_it_was_asked(sandbox, api, tmp_path):
    entry = {"name": ".bashrc", "path": "out/report.md", "checksum": "sha256:0", "contains_secret": False}
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": [entry]}))
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"told").hexdigest()}
    api.on("GET", f"/tasks/{TASK}/artifacts/.bashrc", Answer(200, [b"told"], headers))
    assert sandbox("task", "download", TASK, "out/report.md").returncode == 0
    assert ((tmp_path / "report.md").read_bytes(), (tmp_path / ".bashrc").exists()) == (b"told", False)


def test_a_damaged_download_ends_with_10_and_leaves_no_file(sandbox, api, tmp_path):
    api.on("GET", f"/tasks/{TASK}/artifacts/a", Answer(200, [b"x"], {"X-Checksum-SHA256": "0" * 64}))
    entry = {"name": "a", "path": "a", "contains_secret": False, "checksum": ""}
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"artifacts": [entry]}))
    result = sandbox("task", "download", TASK, "a")
    assert result.returncode == 10
    assert b"damaged" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_set_changes_fields_and_leaves_the_rest(sandbox, task, api, manifest):
    settings = [
        "--set",
        "vm.cpus=16",
        "--set",
        "lifecycle.artifact_patterns[0]=*.md",
        "--set",
        "claude.prompt=Be: kind",
    ]
    assert sandbox("task", "submit", manifest, *settings).returncode == 0
    sent = json.loads(api.to("POST", "/tasks")[0].body)
    assert (sent["vm"], sent["lifecycle"]) == ({"cpus": 16}, {"artifact_patterns": ["*.md"]})
    assert (sent["claude"], sent["repository"]["branch"]) == ({"prompt": "Be: kind"}, "main")


def test_mistakes_after_set_are_told_with_the_place_that_they_come_from(sandbox, api, manifest, tmp_path):
    (tmp_path / manifest).write_bytes(MANIFEST + b"vm:\n  colour: red\n")

    def judge(asked):
        try:
            parse_manifest(asked.body, is_json=True)
        except InvalidManifestError as error:
            return of_error(400, "invalid_manifest", error.message, field_error_details(error.errors))

    api.on("POST", "/tasks", judge)
    result = sandbox("task", "submit", manifest, "--set", "vm.cpus=many", "--set", "vm.size=1")
    assert result.returncode == 9
    lines = result.stderr.decode().splitlines()
    assert [line.partition(" ")[2] if line.startswith("--set") else line for line in lines[:3]] == [
        "vm.cpus=many: vm.cpus: must be a whole number, not text",
        "task.yaml:7:3: vm.colour: is an unknown field",
        "vm.size=1: vm.size: is an unknown field",
    ]


def test_a_manifest_that_cannot_be_read_is_not_sent_with_changes(sandbox, api, manifest, tmp_path):
    (tmp_path / manifest).write_bytes(MANIFEST + b"kind: Task\n")
    result = sandbox("task", "submit", manifest, "--set", "vm.cpus=2")
    assert (result.returncode, api.asked) == (9, [])
    assert result.stderr.startswith(b"task.yaml:6:1: kind: appears more than once")


def test_a_hole_in_a_list_is_refused_before_anything_is_sent(sandbox, api, manifest):
    result = sandbox("task", "submit", manifest, "--set", "secrets[3].name=X")
    assert (result.returncode, api.asked) == (2, [])
    assert b"the next one is [0]" in result.stderr


def test_a_submission_whose_answer_was_lost_is_asked_for_again_with_the_same_key(sandbox, api, manifest):
    lost = Answer(202, [b"{"], {"Content-Length": "100"})
    api.on("POST", "/tasks", lost, of_json({"task_id": TASK, "state": "pending"}, 202))
    assert sandbox("task", "submit", manifest).stdout == f"{TASK}\n".encode()
    keys = {asked.headers["idempotency-key"] for asked in api.to("POST", "/tasks")}
    assert (len(api.asked), len(keys)) == (2, 1)
    assert sandbox("task", "submit", manifest).returncode == 0
    assert api.asked[-1].headers["idempotency-key"] not in keys


def test_release_says_that_the_sandbox_is_gone(sandbox, api):
    answer = {"success": True, "task_id": TASK, "message": "It is released."}
    api.on("DELETE", f"/tasks/{TASK}/vm", of_json(answer))
    assert sandbox("task", "release", TASK).stderr == b"It is released.\n"
    assert json.loads(sandbox("task", "release", TASK, "-f", "json").stdout) == answer
    assert sandbox("task", "release", "other").returncode == 3


def test_logs_in_json_are_lines_of_events_without_following(sandbox, api):
    event = {"type": "tool_call", "task_id": TASK, "seq": 3, "timestamp": "t", "tool": "Bash"}
    line = b"[t] [EVENT] " + json.dumps(event).encode() + b"\n"
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, [LOG, line, b"[t] [EVENT] not json\n", b"odd\n"]))
    told = [json.loads(line) for line in sandbox("task", "logs", TASK, "--format", "json").stdout.splitlines()]
    assert [frame["type"] for frame in told] == ["output", "output", "tool_call"]
    assert told[1] == {
        "type": "output",
        "task_id": TASK,
        "timestamp": "2026-01-29T10:10:15.124Z",
        "stream": "stderr",
        "data": "oh [x] y\n",
    }
    assert told[2] == event


def test_what_contains_a_secret_is_only_handed_out_to_those_who_ask(sandbox, artifacts, tmp_path):
    for name in (".envrc", "out/.envrc"):
        result = sandbox("task", "download", TASK, name)
        assert (result.returncode, list(tmp_path.iterdir())) == (5, [])
        assert b"add --allow-secrets" in result.stderr
    assert sandbox("task", "download", TASK, ".envrc", "-o", "-").stdout == b""
    result = sandbox("task", "download", TASK, "--all")
    assert (result.returncode, [file.name for file in (tmp_path / TASK).iterdir()]) == (5, ["fix-42.patch"])
    assert sandbox("task", "download", TASK, "out/.envrc", "--allow-secrets").returncode == 0
    assert (tmp_path / ".envrc").read_bytes() == b"rm -rf ~\n"


def test_verify_reads_the_files_back_and_tells_their_checksums(sandbox, artifacts, tmp_path):
    result = sandbox("task", "download", TASK, "--all", "--verify", "--allow-secrets")
    digest = hashlib.sha256(b"diff\n").hexdigest()
    assert result.returncode == 0
    assert result.stderr.splitlines()[0] == f"fix-42/fix-42.patch  5 B  sha256:{digest}".encode()


def test_only_a_file_can_be_read_back(sandbox, artifacts, api):
    result = sandbox("task", "download", TASK, "fix-42.patch", "-o", "/dev/full", "--verify")
    assert (result.returncode, api.to("GET", f"/tasks/{TASK}/artifacts/fix-42.patch")) == (2, [])
    assert b"--verify" in result.stderr


def test_verify_notices_a_file_that_is_not_the_listed_one(sandbox, api, artifacts):
    listed = [{**entry, "checksum": "sha256:" + "0" * 64} for entry in artifacts]
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": listed}))
    assert sandbox("task", "download", TASK, "fix-42.patch", "--verify").returncode == 10


def test_an_artifact_that_is_not_there_is_not_found(sandbox, artifacts):
    result = sandbox("task", "download", TASK, "report.md")
    assert result.returncode == 3
    assert b"sandbox task artifacts fix-42" in result.stderr


def test_all_pages_of_a_list_are_put_together(sandbox, api):
    first = {"tasks": [status("running", task_id="a")], "total_count": 2, "has_more": True, "next_cursor": "c"}
    second = {"tasks": [status("running", task_id="b")], "total_count": 2, "has_more": False, "next_cursor": None}
    pages = {None: first, "c": second}
    api.on("GET", "/tasks", lambda asked: of_json(pages[asked.query.get("cursor", [None])[0]]))
    result = sandbox("task", "list", "--all", "--state", "running")
    assert [line.split()[0] for line in result.stdout.decode().splitlines()] == ["ID", "a", "b"]
    assert result.stderr == b""
    together = json.loads(sandbox("task", "list", "--all", "-f", "json").stdout)
    assert [task["id"] for task in together["tasks"]] == ["a", "b"]
    assert (together["has_more"], together["next_cursor"]) == (False, None)
    assert api.asked[1].query == {"state": ["running"], "limit": ["1000"], "cursor": ["c"]}


def test_a_list_that_goes_on_says_how_to_see_the_rest(sandbox, api):
    api.on("GET", "/tasks", of_json({"tasks": [status("running")], "total_count": 7}))
    assert sandbox("task", "list").stderr == b"1 of 7 tasks; see more with --limit, or --all.\n"


@pytest.mark.parametrize("command", [("list",), ("submit", "task.yaml"), ("status", TASK)])
def test_a_token_with_a_line_end_is_told_in_a_sentence(sandbox, environment, api, manifest, command):
    environment["SANDBOX_TOKEN"] = "secret-token\r"
    result = sandbox("task", *command)
    assert (result.returncode, api.asked) == (2, [])
    assert b"The token (--token, SANDBOX_TOKEN)" in result.stderr
    assert b"secret-token" not in result.stderr


ELSEWHERE = {"hello": "world"}
OF_ANOTHER_KIND = status("running", created_at=5, progress={"turns": "many"})


@pytest.mark.parametrize(
    ("arguments", "method", "path", "answer"),
    [
        (("task", "submit", "task.yaml"), "POST", "/tasks", ELSEWHERE),
        (("task", "submit", "task.yaml", "-f", "json"), "POST", "/tasks", ELSEWHERE),
        (("task", "wait", TASK), "GET", f"/tasks/{TASK}", ELSEWHERE),
        (("task", "status", TASK), "GET", f"/tasks/{TASK}", OF_ANOTHER_KIND),
        (("task", "status", TASK), "GET", f"/tasks/{TASK}", {"id": TASK, "state": "running"}),
        (("task", "list"), "GET", "/tasks", {"tasks": [{}], "total_count": 1}),
        (("task", "artifacts", TASK), "GET", f"/tasks/{TASK}/artifacts", {"artifacts": [{"name": "a"}]}),
        (("task", "cancel", TASK), "DELETE", f"/tasks/{TASK}", ELSEWHERE),
        (("admin", "drain"), "POST", "/admin/drain", {"draining": True}),
        (("admin", "prune", "--keep", "1"), "POST", "/admin/prune", {"tasks": [{"id": "a"}]}),
    ],
)
def test_an_answer_that_makes_no_sense_is_told_in_a_sentence(sandbox, api, manifest, arguments, method, path, answer):
    api.on(method, path, of_json(answer))
    result = sandbox(*arguments)
    assert result.returncode == 10
    assert b"Check the address of the server" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["status", "logs", "wait", "cancel", "artifacts", "diff"])
def test_an_id_that_is_none_is_told_before_anything_is_asked(sandbox, api, command):
    yes = ["-y"] if command == "cancel" else []
    empty = sandbox("task", command, "", *yes)
    assert (empty.returncode, empty.stderr) == (2, b"Error: The id of a task must not be empty.\n")
    other = sandbox("task", command, f"{TASK}/vm", *yes)
    assert (other.returncode, other.stderr) == (3, b"Error: There is no task 'fix-42/vm'; no id has a slash.\n")
    assert api.asked == []


@pytest.mark.parametrize(
    ("command", "method", "path"),
    [
        (("task", "list"), "GET", "/tasks"),
        (("task", "status", TASK), "GET", f"/tasks/{TASK}"),
        (("task", "cancel", TASK, "-y"), "DELETE", f"/tasks/{TASK}"),
        (("admin", "drain"), "POST", "/admin/drain"),
    ],
)
def test_an_address_without_the_api_is_told_as_that(sandbox, api, command, method, path):
    api.on(method, path, of_error(404, "not_found", "There is nothing at this address."))
    result = sandbox(*command)
    assert result.returncode == 10
    assert b"Check the address of the server" in result.stderr


def test_a_place_that_is_not_there_is_named(sandbox, artifacts):
    result = sandbox("task", "download", TASK, "fix-42.patch", "-o", "nowhere/x.patch")
    assert result.returncode == 2
    assert b"There is no directory nowhere" in result.stderr
