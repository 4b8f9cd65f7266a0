"""`sandbox run` starts a task from the current checkout and applies its patch there."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from doubles.bare_repository import make_bare_repository
from doubles.deployment import git, wait_until
from doubles.fake_api import ApiResponse, error_response, json_response, sse_response
from doubles.sample_task import TASK_ID, task_events, task_status

URL = "https://github.com/org/app.git"


@pytest.fixture
def checkout(tmp_path):
    """A clean checkout whose only commit is on origin/main."""
    directory = tmp_path / "checkout"
    (directory / "src").mkdir(parents=True)
    git("init", "-q", "-b", "main", ".", cwd=directory)
    (directory / "src" / "app.py").write_text("print('hello')\n")
    commit(directory)
    git("remote", "add", "origin", URL, cwd=directory)
    push(directory)
    return directory


def commit(directory, message="Begin"):
    git("add", "-A", ".", cwd=directory)
    git("commit", "-q", "-m", message, cwd=directory)


def push(directory, branch="main", remote="origin"):
    """Update the remote-tracking branch as a push does."""
    git("update-ref", f"refs/remotes/{remote}/{branch}", "HEAD", cwd=directory)


def head(directory, revision="HEAD"):
    return git("rev-parse", revision, cwd=directory).strip()


@pytest.fixture
def completed_task(api, checkout):
    """A task that changes the greeting, adds a file, and completes."""
    (checkout / "src" / "app.py").write_text("print('goodbye')\n")
    (checkout / "new.txt").write_text("new\n")
    git("add", "-A", ".", cwd=checkout)
    patch = git("diff", "--cached", "--binary", "--full-index", cwd=checkout).encode()
    git("reset", "-q", "--hard", cwd=checkout)
    serve_task(api, patch)
    return patch


def serve_task(api, patch, state="completed"):
    api.on("POST", "/tasks", json_response({"task_id": TASK_ID, "state": "pending"}, 202))
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status(state)))
    api.on("GET", f"/tasks/{TASK_ID}/logs", sse_response(task_events()))
    name = f".sandbox/{TASK_ID}.patch"
    artifacts = [{"name": f"{TASK_ID}.patch", "path": name, "contains_secret": False}]
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": artifacts}))
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/.sandbox%2F{TASK_ID}.patch", artifact_response(patch))


def artifact_response(data):
    headers = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
    return lambda _: ApiResponse(200, [data], headers)


def submitted(api):
    return json.loads(api.requests_to("POST", "/tasks")[0].body)


def test_task_starts_at_the_pushed_commit_and_in_the_current_directory(api, completed_task, run_cli, checkout):
    result = run_cli("run", "Say goodbye.\nPolitely.", cwd=checkout / "src")
    assert result.returncode == 0, result.stderr
    assert submitted(api) == {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "Say goodbye."},
        "repository": {"url": URL, "branch": "main", "commit": head(checkout), "subpath": "src"},
        "claude": {"prompt": "Say goodbye.\nPolitely."},
    }
    assert result.stdout == f"{TASK_ID}\n".encode()
    errors = result.stderr.decode()
    assert errors.startswith(f"From {URL}, main at {head(checkout)[:12]}.\n")
    assert "▸ Edit  src/app/parser.py" in errors


def test_name_of_a_long_prompt_is_cut_at_a_word(api, completed_task, run_cli, checkout):
    prompt = "Restructure " * 30
    assert run_cli("run", prompt, "--no-apply", cwd=checkout).returncode == 0
    assert set(submitted(api)["metadata"]["name"].removesuffix("…").split()) == {"Restructure"}


def test_patch_is_not_applied_without_a_terminal(completed_task, run_cli, checkout):
    result = run_cli("run", "Say goodbye.", cwd=checkout)
    assert f"Apply:     sandbox task apply {TASK_ID}" in result.stderr.decode()
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_apply_option_applies_the_patch(completed_task, run_cli, checkout):
    result = run_cli("run", "Say goodbye.", "--apply", cwd=checkout)
    assert (result.returncode, (checkout / "src" / "app.py").read_text()) == (0, "print('goodbye')\n")
    assert "Applied to 2 files and staged." in result.stderr.decode()
    assert git("status", "--porcelain", cwd=checkout) == "A  new.txt\nM  src/app.py\n"


@pytest.mark.parametrize(("answer", "is_applied"), [(b"y\n", True), (b"n\n", False)])
def test_terminal_shows_the_patch_and_prompts(completed_task, on_terminal, terminal, checkout, answer, is_applied):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    output = terminal.read_until(b"[y/n]:")
    assert b"print('goodbye')" in output
    assert b"2 files changed, 2 insertions(+), 1 deletion(-)" in output
    terminal.type(answer)
    terminal.read_to_end(process)
    end = terminal.output.partition(b"[y/n]:")[2]
    assert process.returncode == 0
    assert ((checkout / "new.txt").exists()) == is_applied
    assert (b"Applied to 2 files" in end, b"Nothing was applied." in end) == (is_applied, not is_applied)
    assert b"new.txt" not in end, "the files are listed above the question"


@pytest.fixture
def long_patch_task(api, checkout):
    """A task whose patch is longer than the terminal, with a final message, a cost and a refused connection."""
    for number in range(40):
        (checkout / f"new-{number:02}.txt").write_text("".join(f"line {line}\n" for line in range(10)))
    git("add", "-A", ".", cwd=checkout)
    patch = git("diff", "--cached", "--binary", "--full-index", cwd=checkout).encode()
    git("reset", "-q", "--hard", cwd=checkout)
    serve_task(api, patch)
    refused = {"host": "files.example.org", "port": 443, "reason": "vm.network_mode is isolated"}
    event = json.dumps({"type": "egress_denied", "seq": 9, "timestamp": "2026-01-29T10:00:00.000Z", **refused})
    log = ApiResponse(200, [f"[2026-01-29T10:00:00.000Z] [EVENT] {event}\n".encode()], {"Content-Type": "text/plain"})
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/logs",
        lambda request: sse_response(task_events()) if "follow" in request.query else log,
    )
    task = task_status("completed", final_message="Added the files.\nAll tests pass.")
    task["progress"]["egress_denied"] = 1
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task))


def test_patch_that_exceeds_the_screen_is_summarized_above_the_outcome(
    long_patch_task, on_terminal, terminal, checkout, environment
):
    environment["GIT_PAGER"] = "sed s/^/paged:/"
    terminal.resize(80, 30)
    process = on_terminal("run", "Add files.", "--directory", str(checkout), "--no-color")
    output = terminal.read_until(b"[y/n/d]:").decode().replace("\r", "")
    assert "+line 1" not in output
    assert output.partition("new-14.txt\n")[2].splitlines()[:9] == [
        "… 25 more files",
        "40 files changed, 400 insertions(+)",
        f"  Diff:      sandbox task diff {TASK_ID}",
        "  Message:   Added the files.",
        "             All tests pass.",
        "  Cost:      $0.0895",
        "  Refused:   1 connection to files.example.org:443: vm.network_mode is isolated",
        f"  Allow:     sandbox task rerun {TASK_ID} --set vm.network_mode=outbound --set "
        "'vm.allowed_hosts[0]=files.example.org'",
        "Apply this to the checkout? (d: show the diff) [y/n/d]: ",
    ]
    terminal.type(b"d\n")
    terminal.read_until(b"paged:+line 1")
    terminal.type(b"n\n")
    assert b"Nothing was applied." in terminal.read_to_end(process)


def test_refused_hosts_are_printed_last_without_a_terminal(long_patch_task, run_cli, checkout):
    result = run_cli("run", "Add files.", "--apply", cwd=checkout)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, sum(line.endswith(".txt") for line in lines)) == (0, 40)
    assert lines[-2] == "  Refused:   1 connection to files.example.org:443: vm.network_mode is isolated"
    assert lines[-1].startswith(f"  Allow:     sandbox task rerun {TASK_ID} --set vm.network_mode=outbound")


def test_carriage_return_in_the_patch_is_escaped(api, on_terminal, terminal, checkout):
    (checkout / "src" / "app.py").write_bytes(b"good()\r-evil()\n")
    serve_task(api, git("diff", cwd=checkout).encode())
    git("reset", "-q", "--hard", cwd=checkout)
    on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    assert rb"+good()\r-evil()" in terminal.read_until(b"[y/n]:")


def is_sleeping(pid):
    """Return whether the process is sleeping. Only then does a signal interrupt its read of the answer."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_interrupted_prompt_prints_the_apply_command(completed_task, on_terminal, terminal, checkout):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    terminal.read_until(b"[y/n]:")
    wait_until(lambda: is_sleeping(process.pid), description="the process to read the answer")
    process.send_signal(2)
    terminal.read_to_end(process)
    assert process.returncode == 0
    end = terminal.output.decode().replace("\r", "").partition("[y/n]:")[2]
    assert f"\nNothing was applied.\n  Diff:      sandbox task diff {TASK_ID}\n  Apply:     sandbox task apply" in end
    assert "new.txt" not in end
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_json_output_ends_with_the_patch(completed_task, run_cli, checkout):
    lines = run_cli("run", "Say goodbye.", "--apply", "-f", "json", cwd=checkout).stdout.splitlines()
    assert json.loads(lines[-2])["type"] == "end"
    last = json.loads(lines[-1])
    assert (last["type"], last["applied"], [file["path"] for file in last["files"]]) == (
        "patch", True, ["new.txt", "src/app.py"],
    )  # fmt: skip


def test_prompt_from_stdin_and_set_options_are_used(api, completed_task, run_cli, checkout):
    result = run_cli("run", "-", "--set", "vm.cpus=2", "--id", "mine", stdin=b"Say it.\n", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert (submitted(api)["claude"]["prompt"], submitted(api)["vm"]) == ("Say it.\n", {"cpus": 2})
    assert submitted(api)["metadata"]["id"] == "mine"


@pytest.mark.parametrize("prompt", ["-", b"Caf\xe9"])
def test_prompt_that_is_not_utf_8_is_a_usage_error(api, run_cli, checkout, prompt):
    result = run_cli("run", prompt, stdin=b"Caf\xe9", cwd=checkout)
    assert (result.returncode, api.requests) == (2, [])
    assert result.stderr.endswith(b"Error: The prompt must be UTF-8.\n")


@pytest.mark.parametrize("command", ["run", "task submit"])
def test_duplicate_id_error_suggests_the_id_option(api, run_cli, checkout, command, tmp_path):
    existing = {"id": "mine", "state": "completed", "created_at": "2026-01-29T10:10:15.123Z"}
    body = {"error": "duplicate_task_id", "message": "Choose another metadata.id.", "existing_task": existing}
    api.on("POST", "/tasks", json_response(body, 409))
    (tmp_path / "task.json").write_text("{}")
    subject = "Say it." if command == "run" else str(tmp_path / "task.json")
    result = run_cli(*command.split(), subject, "--id", "mine", cwd=checkout)
    assert result.returncode == 4
    assert result.stderr.decode().splitlines()[-3:] == [
        "Error: Task mine already exists and is completed.",
        "  Show it:        sandbox task status mine",
        "  Use another id: add --id ID",
    ]


def test_invalid_set_value_error_names_the_option(api, run_cli, checkout):
    field_error = {
        "field": "vm.cpus",
        "rule": "type",
        "message": "must be a whole number",
        "line": None,
        "column": None,
    }
    api.on("POST", "/tasks", error_response(400, "invalid_manifest", "It has mistakes.", [field_error]))
    result = run_cli("run", "Go.", "--set", "vm.cpus=many", cwd=checkout)
    assert result.returncode == 9
    assert result.stderr.decode().splitlines()[1:] == [
        "Error: --set vm.cpus=many: must be a whole number",
    ]


def test_unpushed_changes_are_rejected_before_submission(api, run_cli, checkout):
    (checkout / "src" / "app.py").write_text("changed\n")
    commit(checkout, "Here only")
    (checkout / "src" / "app.py").write_text("changed again\n")
    result = run_cli("run", "Go.", cwd=checkout)
    assert result.returncode == 4
    errors = result.stderr.decode()
    assert "1 file with uncommitted changes and 1 commit that is not on origin" in errors
    assert "--include-dirty" in errors
    assert "--leave-dirty" in errors
    assert api.requests == []


def test_include_dirty_option_sends_changes_and_applies_the_patch_on_top_of_them(
    api, completed_task, run_cli, checkout
):
    pushed = head(checkout)
    (checkout / "committed.txt").write_text("here only\n")
    commit(checkout, "Here only")
    (checkout / "committed.txt").write_text("and changed\n")
    (checkout / "untracked.bin").write_bytes(b"\0\1\2")
    (checkout / "ignored.log").write_text("noise\n")
    (checkout / ".git" / "info" / "exclude").write_text("*.log\n")
    git("config", "diff.noprefix", "true", cwd=checkout)
    git("config", "diff.context", "0", cwd=checkout)
    before = git("status", "--porcelain", cwd=checkout)
    result = run_cli("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert result.returncode == 0, result.stderr
    repository = submitted(api)["repository"]
    assert repository["commit"] == pushed
    assert b"Including local changes in 2 files: committed.txt, untracked.bin." in result.stderr
    git("clone", "-q", str(checkout), "elsewhere", cwd=checkout.parent)
    elsewhere = checkout.parent / "elsewhere"
    git("checkout", "-q", "--detach", pushed, cwd=elsewhere)
    (elsewhere / "sent.patch").write_bytes(base64.b64decode(repository["patch"]))
    git("apply", "sent.patch", cwd=elsewhere)
    assert (elsewhere / "committed.txt").read_text() == "and changed\n"
    assert (elsewhere / "untracked.bin").read_bytes() == b"\0\1\2"
    assert not (elsewhere / "ignored.log").exists()
    assert (checkout / "new.txt").read_text() == "new\n"
    after = git("status", "--porcelain", cwd=checkout)
    assert set(before.splitlines()) < set(after.splitlines())  # staged and unstaged changes are kept


@pytest.fixture
def edited_task(api, checkout):
    """A task that edits the included files, one tracked and one untracked."""
    (checkout / "notes.txt").write_text("notes\n")
    git("add", "-A", ".", cwd=checkout)
    (checkout / "notes.txt").write_text("better notes\n")
    patch = git("diff", "--full-index", cwd=checkout).encode()
    git("reset", "-q", cwd=checkout)
    (checkout / "notes.txt").write_text("notes\n")
    serve_task(api, patch)


def test_edit_of_an_included_untracked_file_is_applied(edited_task, run_cli, checkout):
    result = run_cli("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert (result.returncode, (checkout / "notes.txt").read_text()) == (0, "better notes\n"), result.stderr
    assert git("status", "--porcelain", cwd=checkout) == "?? notes.txt\n"


@pytest.mark.parametrize("changed", ["notes.txt", "src/app.py"])
def test_suggested_apply_command_works_with_local_changes(edited_task, api, run_cli, checkout, changed):
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/.sandbox%2Fmetadata.json", artifact_response(b"{}"))
    if changed != "notes.txt":
        (checkout / changed).write_text("print('mine')\n")
    result = run_cli("run", "Go.", "--include-dirty", "--no-apply", cwd=checkout)
    advice = f"sandbox task apply {TASK_ID} --beside-changes"
    assert f"  Apply:     {advice}\n" in result.stderr.decode()
    applied = run_cli(*advice.split()[1:], cwd=checkout)
    assert (applied.returncode, (checkout / "notes.txt").read_text()) == (0, "better notes\n"), applied.stderr
    assert b"on top of your changes" in applied.stderr


@pytest.mark.parametrize("flag", ["--skip-worktree", "--assume-unchanged"])
def test_skip_worktree_and_assume_unchanged_files_are_not_sent(api, completed_task, run_cli, checkout, flag):
    (checkout / "local.env").write_text("PASSWORD=\n")
    commit(checkout, "Add settings")
    push(checkout)
    git("update-index", flag, "local.env", cwd=checkout)
    (checkout / "local.env").write_text("PASSWORD=hunter2\n")
    (checkout / "src" / "app.py").write_text("print('changed')\n")
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(submitted(api)["repository"]["patch"])
    assert (b"hunter2" in patch, b"changed" in patch) == (False, True)


def test_include_dirty_option_works_without_a_git_index(api, completed_task, run_cli, checkout):
    (checkout / ".git" / "index").unlink()
    (checkout / "src" / "app.py").write_text("print('changed')\n")
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(submitted(api)["repository"]["patch"])
    assert (b"-print('hello')" in patch, b"+print('changed')" in patch) == (True, True)


def test_include_dirty_option_sends_no_patch_for_a_clean_checkout(api, completed_task, run_cli, checkout):
    assert run_cli("run", "Go.", "--include-dirty", cwd=checkout).returncode == 0
    assert "patch" not in submitted(api)["repository"]


def test_oversized_changes_are_rejected(api, run_cli, checkout):
    (checkout / "large.bin").write_bytes(os.urandom(600 * 1024))
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.requests) == (4, [])
    assert b"the limit is 512 KiB" in result.stderr


def test_huge_file_is_rejected_before_it_is_read(api, run_cli, checkout):
    (checkout / "small.bin").write_bytes(b"small")
    with (checkout / "core.1").open("wb") as file:
        file.truncate(300 * 1024**2)
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.requests) == (4, [])
    assert b"the limit is 512 KiB. The largest is core.1 (300 MiB)." in result.stderr


@pytest.mark.parametrize("name", ["checkout", 'a "checkout": mine'])
def test_include_dirty_option_leaves_no_objects_in_the_repository(api, completed_task, run_cli, checkout, name):
    checkout = checkout.rename(checkout.with_name(name))
    (checkout / "untracked.bin").write_bytes(os.urandom(1000))
    before = git("count-objects", "-v", cwd=checkout)
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert b"untracked.bin" in base64.b64decode(submitted(api)["repository"]["patch"])
    assert git("count-objects", "-v", cwd=checkout) == before


@pytest.fixture
def submodule(checkout):
    """A submodule of the checkout."""
    inner = checkout / "library"
    inner.mkdir()
    git("init", "-q", "-b", "main", ".", cwd=inner)
    (inner / "code.py").write_text("code\n")
    commit(inner)
    commit(checkout, "Add a library")
    push(checkout)
    return inner


def test_dirty_submodule_is_rejected(api, submodule, run_cli, checkout):
    (submodule / "code.py").write_text("better code\n")
    git("config", "diff.ignoreSubmodules", "all", cwd=checkout)
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.requests) == (4, [])
    assert b"The submodule library has uncommitted changes, which cannot be sent." in result.stderr


def test_changed_submodule_commit_is_sent(api, completed_task, submodule, run_cli, checkout):
    (submodule / "code.py").write_text("better code\n")
    commit(submodule, "Improve")
    git("config", "diff.submodule", "log", cwd=checkout)
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(submitted(api)["repository"]["patch"])
    assert f"\n+Subproject commit {head(submodule)}\n".encode() in patch


def test_nested_repository_is_rejected(api, run_cli, checkout):
    (checkout / "below" / "nested").mkdir(parents=True)
    git("init", "-q", "-b", "main", ".", cwd=checkout / "below" / "nested")
    (checkout / "below" / "nested" / "file").write_text("x\n")
    commit(checkout / "below" / "nested")
    result = run_cli("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.requests) == (4, [])
    assert b"below/nested/ is a separate git repository, which cannot be sent." in result.stderr


def test_leave_dirty_option_keeps_local_changes(api, completed_task, run_cli, checkout):
    pushed = head(checkout)
    (checkout / "README.md").write_text("mine\n")
    commit(checkout, "Here only")
    (checkout / "README.md").write_text("mine too\n")
    result = run_cli("run", "Go.", "--leave-dirty", "--apply", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert submitted(api)["repository"]["commit"] == pushed
    assert (checkout / "README.md").read_text() == "mine too\n"
    assert "Applied to 2 files, on top of your changes." in result.stderr.decode()
    assert (checkout / "new.txt").read_text() == "new\n"


def test_conflicting_patch_is_not_partially_applied(api, completed_task, run_cli, checkout):
    (checkout / "src" / "app.py").write_text("something else\n")
    result = run_cli("run", "Go.", "--leave-dirty", "--apply", cwd=checkout)
    assert result.returncode == 4
    assert not (checkout / "new.txt").exists()
    assert result.stderr.decode().splitlines()[-2:] == [
        f"  Diff:      sandbox task diff {TASK_ID}",
        f"  Commit:    sandbox task apply {TASK_ID} --branch sandbox/{TASK_ID}",
    ]


def test_patch_with_a_secret_suggests_allow_secrets(api, completed_task, run_cli, checkout):
    artifacts = [{"name": f"{TASK_ID}.patch", "path": f".sandbox/{TASK_ID}.patch", "contains_secret": True}]
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": artifacts}))
    result = run_cli("run", "Go.", "--apply", cwd=checkout)
    assert result.returncode == 5
    assert f"  Download it anyway: sandbox task apply {TASK_ID} --allow-secrets\n" in result.stderr.decode()


@pytest.fixture
def switched_branch(api, completed_task, checkout):
    """The user checks out another branch while the task is running."""

    def switch(_):
        git("checkout", "-q", "-b", "other", cwd=checkout)
        return sse_response(task_events())

    api.on("GET", f"/tasks/{TASK_ID}/logs", switch)


def test_patch_is_not_applied_to_another_branch(switched_branch, run_cli, checkout):
    result = run_cli("run", "Go.", "--apply", cwd=checkout)
    assert (result.returncode, git("status", "--porcelain", cwd=checkout)) == (4, "")
    at = head(checkout)[:12]
    assert result.stderr.decode().splitlines()[-3:] == [
        f"Error: This checkout was at {at} (main) when the task started, and is at {at} (other) now. "
        "Nothing was applied.",
        f"  Apply it anyway: sandbox task apply {TASK_ID}",
        f"  Commit:          sandbox task apply {TASK_ID} --branch sandbox/{TASK_ID}",
    ]


def test_branch_switched_during_the_prompt_is_detected(completed_task, on_terminal, terminal, checkout):
    git("branch", "another", cwd=checkout)
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    terminal.read_until(b"[y/n]:")
    git("switch", "-q", "another", cwd=checkout)
    terminal.type(b"y\n")
    assert b"Nothing was applied" in terminal.read_to_end(process)
    assert (process.returncode, (checkout / "new.txt").exists()) == (4, False)


def test_prompt_warns_about_another_branch(switched_branch, on_terminal, terminal, checkout):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    output = terminal.read_until(b"[y/n]:")
    assert b"when the task started, and" in output
    terminal.type(b"\n")
    terminal.read_until(b"Type y or n.")
    terminal.type(b"y\n")
    terminal.read_to_end(process)
    assert (process.returncode, (checkout / "new.txt").exists()) == (0, True)


@pytest.mark.parametrize(("dirty", "option"), [("", ""), ("print('mine')\n", " --beside-changes")])
def test_interrupted_run_prints_the_apply_command(api, completed_task, start_cli, checkout, dirty, option):
    ended = threading.Event()

    def events_without_end():
        yield from sse_response(task_events()[:5]).chunks
        ended.wait(60)

    api.on("GET", f"/tasks/{TASK_ID}/logs", lambda _: ApiResponse(200, events_without_end()))
    if dirty:
        (checkout / "src" / "app.py").write_text(dirty)
    process = start_cli("run", "Go.", "--leave-dirty", cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert any(b"  running  " in line for line in iter(process.stderr.readline, b""))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read().decode().splitlines()[-4:] == [
            f"Stopped watching. Task {TASK_ID} continues.",
            f"  Watch again:     sandbox task status {TASK_ID} --watch",
            f"  Cancel it:       sandbox task cancel {TASK_ID}",
            f"  When it is done: sandbox task apply {TASK_ID}{option}",
        ]
    finally:
        ended.set()


def test_failed_task_applies_nothing(api, completed_task, run_cli, checkout):
    serve_task(api, b"", "failed")
    result = run_cli("run", "Go.", "--apply", cwd=checkout)
    assert result.returncode == 1
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_empty_patch_is_reported(api, run_cli, checkout):
    serve_task(api, b"")
    result = run_cli("run", "Look.", "--apply", cwd=checkout)
    assert (result.returncode, result.stderr.decode().splitlines()[-1]) == (0, "The task changed nothing.")


def test_run_without_changes_ends_with_one_sentence(api, run_cli, checkout):
    serve_task(api, b"")
    diff = {"files": 0, "additions": 0, "deletions": 0}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed", diff=diff)))
    result = run_cli("run", "Look.", "--apply", cwd=checkout)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, lines[-1]) == (0, f"Task {TASK_ID} completed without changes.")
    assert "changed nothing" not in result.stderr.decode()


@pytest.mark.parametrize(("option", "code"), [("--apply", 4), ("--no-apply", 0)])
@pytest.mark.parametrize("output_format", ["text", "json"])
def test_truncated_patch_is_not_reported_as_empty(api, run_cli, checkout, option, code, output_format):
    serve_task(api, b"# truncated: it exceeds the maximum patch size (256 MiB)\n")
    result = run_cli("run", "Grow.", option, "-f", output_format, cwd=checkout)
    assert result.returncode == code
    if output_format == "json":
        last = json.loads(result.stdout.splitlines()[-1])
        assert last == {"type": "patch", "task_id": TASK_ID, "applied": False, "files": []}
    assert b"  truncated: it exceeds the maximum patch size (256 MiB)\n" in result.stderr
    assert b"changed nothing" not in result.stderr


def test_untracked_files_are_kept(completed_task, run_cli, checkout):
    (checkout / "notes.txt").write_text("mine\n")
    result = run_cli("run", "Go.", cwd=checkout)
    assert result.returncode == 0
    assert "1 untracked file is not included." in result.stderr.decode()


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://me:s3cr3t@github.com/org/app.git", URL),
        ("git@github.com:org/app.git", "git@github.com:org/app.git"),
        ("short:app.git", URL),
    ],
)
def test_remote_url_is_expanded_and_its_credentials_are_removed(api, completed_task, run_cli, checkout, address, url):
    git("remote", "set-url", "origin", address, cwd=checkout)
    git("config", "url.https://github.com/org/.insteadOf", "short:", cwd=checkout)
    result = run_cli("run", "Go.", cwd=checkout)
    assert submitted(api)["repository"]["url"] == url
    assert b"s3cr3t" not in result.stderr
    assert ("credentials" in result.stderr.decode()) == ("s3cr3t" in address)


def test_fetch_url_of_the_remote_is_cloned(api, completed_task, run_cli, checkout):
    git("remote", "set-url", "--add", "origin", "https://mirror.example.org/app.git", cwd=checkout)
    assert run_cli("run", "Go.", cwd=checkout).returncode == 0
    assert submitted(api)["repository"]["url"] == URL


def test_upstream_branch_is_cloned(api, completed_task, run_cli, checkout):
    git("checkout", "-q", "-b", "mine", cwd=checkout)
    git("remote", "add", "fork", "https://github.com/me/app.git", cwd=checkout)
    push(checkout, "feature/theirs", "fork")
    git("config", "branch.mine.remote", "fork", cwd=checkout)
    git("config", "branch.mine.merge", "refs/heads/feature/theirs", cwd=checkout)
    assert run_cli("run", "Go.", cwd=checkout).returncode == 0
    repository = submitted(api)["repository"]
    assert (repository["url"], repository["branch"]) == ("https://github.com/me/app.git", "feature/theirs")


@pytest.mark.parametrize("detached", [False, True])
def test_commit_on_another_remote_branch_is_cloned(api, completed_task, run_cli, checkout, detached):
    git("checkout", "-q", *(["--detach"] if detached else ["-b", "new"]), cwd=checkout)
    assert run_cli("run", "Go.", cwd=checkout).returncode == 0
    assert (submitted(api)["repository"]["branch"], submitted(api)["repository"]["commit"]) == ("main", head(checkout))


def test_pushed_branch_is_cloned_although_its_upstream_is_another_branch(api, completed_task, run_cli, checkout):
    git("checkout", "-q", "-b", "feature", cwd=checkout)
    git("config", "branch.feature.remote", "origin", cwd=checkout)
    git("config", "branch.feature.merge", "refs/heads/main", cwd=checkout)
    (checkout / "feature.txt").write_text("new\n")
    commit(checkout, "Add a feature")
    refused = run_cli("run", "Go.", cwd=checkout)
    assert (refused.returncode, b"1 commit that is not on origin" in refused.stderr) == (4, True)
    push(checkout, "feature")
    result = run_cli("run", "Go.", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert result.stderr.decode().startswith(f"From {URL}, feature at {head(checkout)[:12]}.\n")
    repository = submitted(api)["repository"]
    assert (repository["branch"], repository["commit"]) == ("feature", head(checkout))


def test_specified_branch_is_cloned_at_its_latest_commit(api, completed_task, run_cli, checkout):
    result = run_cli("run", "Go.", "--set", "repository.branch=release", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert submitted(api)["repository"] == {"url": URL, "branch": "release"}
    assert result.stderr.decode().startswith(f"From {URL}, the latest commit of release.\n")


def test_specified_commit_is_cloned(api, completed_task, run_cli, checkout):
    options = ("--set", "repository.branch=release", "--set", "repository.commit=0123456789abcdef")
    result = run_cli("run", "Go.", *options, cwd=checkout)
    assert submitted(api)["repository"] == {"url": URL, "branch": "release", "commit": "0123456789abcdef"}
    assert result.stderr.decode().startswith(f"From {URL}, release at 0123456789ab.\n")


def test_specified_branch_of_the_checkout_is_cloned_at_its_local_commit(api, completed_task, run_cli, checkout):
    assert run_cli("run", "Go.", "--set", "repository.branch=main", cwd=checkout).returncode == 0
    assert submitted(api)["repository"] == {"url": URL, "branch": "main", "commit": head(checkout)}


def test_local_changes_are_not_sent_to_a_specified_branch(api, run_cli, checkout):
    (checkout / "notes.txt").write_text("mine\n")
    result = run_cli("run", "Go.", "--include-dirty", "--set", "repository.branch=release", cwd=checkout)
    assert (result.returncode, api.requests) == (2, [])
    assert b"your changes are based on main at" in result.stderr


def delete_tracking_branch(directory):
    git("update-ref", "-d", "refs/remotes/origin/main", cwd=directory)


def rename_unpushed_branch(directory):
    delete_tracking_branch(directory)
    git("branch", "-m", "x;touch${IFS}mark", cwd=directory)


def add_second_remote(directory):
    git("remote", "rename", "origin", "a", cwd=directory)
    git("remote", "add", "b", URL, cwd=directory)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda directory: git("remote", "remove", "origin", cwd=directory), "git remote add origin URL"),
        (
            lambda directory: git("remote", "set-url", "origin", "/srv/app.git", cwd=directory),
            "The URL of origin must be https://",
        ),
        (delete_tracking_branch, "git push -u origin main"),
        (rename_unpushed_branch, "git push -u origin 'x;touch${IFS}mark'"),
        (add_second_remote, "--remote NAME"),
    ],
    ids=["no remote", "path", "never pushed", "never pushed, name with shell syntax", "several remotes"],
)
def test_unusable_checkout_error_suggests_a_fix(api, run_cli, checkout, change, advice):
    change(checkout)
    result = run_cli("run", "Go.", cwd=checkout)
    assert (result.returncode, api.requests) == (2, [])
    assert advice in result.stderr.decode()


@pytest.mark.parametrize("mechanism", ["monitor", "hook"])
def test_programs_configured_in_the_checkout_are_not_executed(api, completed_task, run_cli, checkout, mechanism):
    marker = checkout.parent / "ran"
    program = checkout / ".git" / "hooks" / "post-index-change"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    if mechanism == "monitor":
        program = program.rename(checkout / ".git" / "monitor")
        git("config", "core.fsmonitor", str(program), cwd=checkout)
    (checkout / "untracked.txt").write_text("new\n")
    result = run_cli("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert (result.returncode, marker.exists()) == (0, False), result.stderr
    assert (checkout / "new.txt").read_text() == "new\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "Go.", "--include-dirty"], "cannot use bare repository"),
        (["task", "apply", TASK_ID], "cannot use bare repository"),
        (["init", "--yes"], "is not in a git checkout"),
    ],
)
def test_bare_repository_in_the_working_tree_is_not_used(api, completed_task, run_cli, checkout, command, message):
    """A patch can add such a directory, and git would run the programs in its configuration."""
    marker = checkout.parent / "ran"
    program = f"touch {marker}; cat"
    configuration = (
        f'[core]\n\tworktree = .\n\tfsmonitor = {program}\n[filter "x"]\n\tclean = {program}\n\tsmudge = {program}\n'
    )
    tools = make_bare_repository(checkout / "tools", configuration)
    (tools / ".gitattributes").write_text("* filter=x\n")
    result = run_cli(*command, cwd=tools)
    assert (result.returncode, marker.exists()) == (2, False), result.stderr
    assert message in result.stderr.decode()


def test_run_outside_a_checkout_is_a_usage_error(run_cli, tmp_path):
    result = run_cli("run", "Go.")
    assert (result.returncode, f"{tmp_path} is not in a git checkout" in result.stderr.decode()) == (2, True)


def test_untrusted_checkout_error_quotes_git(run_cli, checkout, environment):
    environment["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"
    result = run_cli("run", "Go.", cwd=checkout)
    assert result.returncode == 2
    errors = result.stderr.decode()
    assert "dubious ownership" in errors
    assert f"git config --global --add safe.directory {checkout}" in errors
    assert "not in a git checkout" not in errors
