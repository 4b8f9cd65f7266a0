"""The commands of `sandbox task` as a user or a script runs them: stdout, stderr and exit codes."""

import hashlib
import json

import pytest

from doubles.recorded_api import Answer, of_error, of_frames, of_json
from doubles.recorded_story import TASK, frames, status

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
        api.on("GET", f"/tasks/{TASK}/logs", of_frames(frames()))

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
    assert sent["metadata"] == {"name": "Fix bug #42", "id": "mine-1", "labels": {}}
    assert sent["claude"]["prompt"] == "Fix it"


def test_the_manifest_with_another_id_is_still_one_that_the_server_takes(sandbox, task, api, manifest):
    from sandbox.model.manifest_parsing import parse_manifest

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
    assert result.stderr == b"task.yaml:12:3: vm.memory: must be a size\nError: The manifest has 1 mistake.\n"


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
    assert lines[:3] == ["Task      fix-42", "Name      Fix bug #42", "State     failed  Claude Code is working"]
    assert lines[-1] == "Error     agent_failed: Claude Code exited with 1."
    assert json.loads(sandbox("task", "status", TASK, "--format", "json").stdout) == status("failed")


def test_watching_a_task_tells_its_story_and_ends_with_it(sandbox, task):
    result = sandbox("task", "status", TASK, "--watch")
    assert result.returncode == 0
    assert b"completed     Claude Code finished its work\n" in result.stdout


def test_watching_a_task_that_has_ended_shows_how(sandbox, api):
    api.on("GET", f"/tasks/{TASK}", of_json(status("completed")))
    assert b"State     completed" in sandbox("task", "status", TASK, "-w").stdout


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
    assert result.stderr == b"2 of 7 tasks; see more with --limit.\n"


def test_lists_are_narrowed_down(sandbox, api):
    api.on("GET", "/tasks", of_json({"tasks": [], "total_count": 0}))
    result = sandbox("task", "list", "--state", "running", "--label", "team=platform", "--limit", "5")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"No tasks.\n")
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
        size = {"size_bytes": len(data), "content_type": "text/plain", "contains_secret": name == ".envrc"}
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
    result = sandbox("task", "download", TASK, "--all", "-f", "json")
    assert sorted(file.name for file in (tmp_path / TASK).iterdir()) == [".envrc", "fix-42.patch"]
    assert [file["size_bytes"] for file in json.loads(result.stdout)["files"]] == [5, 9]
    assert not (tmp_path / ".envrc").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/..", ""])
def test_a_name_that_leads_out_of_the_directory_is_not_written(sandbox, api, tmp_path, name):
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"x").hexdigest()}
    entry = {"name": name, "path": name, "size_bytes": 1, "content_type": "t", "contains_secret": False}
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": [entry]}))
    api.on("GET", f"/tasks/{TASK}/artifacts/{name}", Answer(200, [b"x"], headers))
    assert sandbox("task", "download", TASK, "--all").returncode == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_damaged_download_ends_with_10_and_leaves_no_file(sandbox, api, tmp_path):
    api.on("GET", f"/tasks/{TASK}/artifacts/a", Answer(200, [b"x"], {"X-Checksum-SHA256": "0" * 64}))
    result = sandbox("task", "download", TASK, "a")
    assert result.returncode == 10
    assert b"damaged" in result.stderr
    assert list(tmp_path.iterdir()) == []
