"""`sandbox run`: a task from the checkout that one is in, and its patch back into it."""

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest

from doubles.live_server import git, until
from doubles.recorded_api import Answer, of_error, of_frames, of_json
from doubles.recorded_task import TASK, frames, status

URL = "https://github.com/org/app.git"


@pytest.fixture
def checkout(tmp_path):
    """A clean checkout whose one commit is on origin/main."""
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
    """What a push leaves here of what is there."""
    git("update-ref", f"refs/remotes/{remote}/{branch}", "HEAD", cwd=directory)


def head(directory, revision="HEAD"):
    return git("rev-parse", revision, cwd=directory).strip()


@pytest.fixture
def done(api, checkout):
    """The task changes the greeting and adds a file, and completes."""
    (checkout / "src" / "app.py").write_text("print('goodbye')\n")
    (checkout / "new.txt").write_text("new\n")
    git("add", "-A", ".", cwd=checkout)
    patch = git("diff", "--cached", "--binary", "--full-index", cwd=checkout).encode()
    git("reset", "-q", "--hard", cwd=checkout)
    play(api, patch)
    return patch


def play(api, patch, state="completed"):
    api.on("POST", "/tasks", of_json({"task_id": TASK, "state": "pending"}, 202))
    api.on("GET", f"/tasks/{TASK}", of_json(status(state)))
    api.on("GET", f"/tasks/{TASK}/logs", of_frames(frames()))
    name = f".sandbox/{TASK}.patch"
    listed = [{"name": f"{TASK}.patch", "path": name, "contains_secret": False}]
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": listed}))
    api.on("GET", f"/tasks/{TASK}/artifacts/.sandbox%2F{TASK}.patch", of_bytes(patch))


def of_bytes(data):
    checksum = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
    return lambda _: Answer(200, [data], checksum)


def sent(api):
    return json.loads(api.to("POST", "/tasks")[0].body)


def test_a_task_begins_at_the_pushed_commit_in_the_directory_that_one_is_in(api, done, sandbox, checkout):
    result = sandbox("run", "Say goodbye.\nPolitely.", cwd=checkout / "src")
    assert result.returncode == 0, result.stderr
    assert sent(api) == {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "Say goodbye."},
        "repository": {"url": URL, "branch": "main", "commit": head(checkout), "subpath": "src"},
        "claude": {"prompt": "Say goodbye.\nPolitely."},
    }
    assert result.stdout == f"{TASK}\n".encode()
    told = result.stderr.decode()
    assert told.startswith(f"From {URL}, main at {head(checkout)[:12]}.\n")
    assert "▸ Edit  src/app/parser.py" in told


def test_off_a_terminal_nothing_is_applied_unless_that_was_asked_for(done, sandbox, checkout):
    result = sandbox("run", "Say goodbye.", cwd=checkout)
    assert f"Apply it:   sandbox task apply {TASK}" in result.stderr.decode()
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_the_patch_is_applied_on_request(done, sandbox, checkout):
    result = sandbox("run", "Say goodbye.", "--apply", cwd=checkout)
    assert (result.returncode, (checkout / "src" / "app.py").read_text()) == (0, "print('goodbye')\n")
    assert "Applied to 2 files and staged." in result.stderr.decode()
    assert git("status", "--porcelain", cwd=checkout) == "A  new.txt\nM  src/app.py\n"


@pytest.mark.parametrize(("answer", "applied"), [(b"y\n", True), (b"n\n", False)])
def test_a_terminal_is_shown_the_patch_and_asked(done, on_terminal, terminal, checkout, answer, applied):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    shown = terminal.read_until(b"[y/n]:")
    assert b"print('goodbye')" in shown
    terminal.type(answer)
    terminal.read_to_end(process)
    assert process.returncode == 0
    assert ((checkout / "new.txt").exists()) == applied


def test_a_line_that_pretends_to_be_two_is_shown_as_the_one_that_would_be_applied(api, on_terminal, terminal, checkout):
    (checkout / "src" / "app.py").write_bytes(b"good()\r-evil()\n")
    play(api, git("diff", cwd=checkout).encode())
    git("reset", "-q", "--hard", cwd=checkout)
    on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    assert rb"+good()\r-evil()" in terminal.read_until(b"[y/n]:")


def is_waiting(pid):
    """A signal between a prompt and the wait for its answer is seen only with the answer."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_who_does_not_answer_is_told_how_to_apply_it_later(done, on_terminal, terminal, checkout):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    terminal.read_until(b"[y/n]:")
    until(lambda: is_waiting(process.pid), what="the answer to be waited for")
    process.send_signal(2)
    terminal.read_to_end(process)
    assert process.returncode == 0
    assert f"Apply it:   sandbox task apply {TASK}".encode() in terminal.seen
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_for_programs_the_patch_is_the_last_line(done, sandbox, checkout):
    lines = sandbox("run", "Say goodbye.", "--apply", "-f", "json", cwd=checkout).stdout.splitlines()
    assert json.loads(lines[-2])["type"] == "end"
    last = json.loads(lines[-1])
    assert (last["type"], last["applied"], [file["path"] for file in last["files"]]) == (
        "patch", True, ["new.txt", "src/app.py"],
    )  # fmt: skip


def test_the_prompt_may_come_from_stdin_and_fields_may_be_set(api, done, sandbox, checkout):
    result = sandbox("run", "-", "--set", "vm.cpus=2", "--id", "mine", stdin=b"Say it.\n", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert (sent(api)["claude"]["prompt"], sent(api)["vm"]) == ("Say it.\n", {"cpus": 2})
    assert sent(api)["metadata"]["id"] == "mine"


@pytest.mark.parametrize("prompt", ["-", b"Caf\xe9"])
def test_a_prompt_that_is_not_utf_8_is_a_mistake_of_usage(api, sandbox, checkout, prompt):
    result = sandbox("run", prompt, stdin=b"Caf\xe9", cwd=checkout)
    assert (result.returncode, api.asked) == (2, [])
    assert result.stderr.endswith(b"Error: The prompt must be UTF-8.\n")


@pytest.mark.parametrize("command", ["run", "task submit"])
def test_an_id_that_is_taken_is_told_with_the_option_that_gives_another(api, sandbox, checkout, command, tmp_path):
    existing = {"id": "mine", "state": "completed", "created_at": "2026-01-29T10:10:15.123Z"}
    told = {"error": "duplicate_task_id", "message": "Choose another metadata.id.", "existing_task": existing}
    api.on("POST", "/tasks", of_json(told, 409))
    (tmp_path / "task.json").write_text("{}")
    subject = "Say it." if command == "run" else str(tmp_path / "task.json")
    result = sandbox(*command.split(), subject, "--id", "mine", cwd=checkout)
    assert result.returncode == 4
    assert result.stderr.decode().splitlines()[-3:] == [
        "Error: Task mine exists already and is completed.",
        "  Look at it:      sandbox task status mine",
        "  Take another id: add --id ID",
    ]


def test_a_mistake_in_what_was_set_is_told_of_the_option(api, sandbox, checkout):
    mistake = {"field": "vm.cpus", "rule": "type", "message": "must be a whole number", "line": None, "column": None}
    api.on("POST", "/tasks", of_error(400, "invalid_manifest", "It has mistakes.", [mistake]))
    result = sandbox("run", "Go.", "--set", "vm.cpus=many", cwd=checkout)
    assert result.returncode == 9
    assert result.stderr.decode().splitlines()[1:] == [
        "--set vm.cpus=many: vm.cpus: must be a whole number",
        "Error: sandbox run has 1 mistake.",
    ]


def test_what_is_not_pushed_stops_it_before_anything_is_paid_for(api, sandbox, checkout):
    (checkout / "src" / "app.py").write_text("changed\n")
    commit(checkout, "Here only")
    (checkout / "src" / "app.py").write_text("changed again\n")
    result = sandbox("run", "Go.", cwd=checkout)
    assert result.returncode == 4
    told = result.stderr.decode()
    assert "1 file changed and not committed and 1 commit not on origin" in told
    assert "--include-dirty" in told
    assert "--leave-dirty" in told
    assert api.asked == []


def test_what_is_not_pushed_can_be_sent_along_and_the_patch_comes_back_upon_it(api, done, sandbox, checkout):
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
    result = sandbox("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert result.returncode == 0, result.stderr
    repository = sent(api)["repository"]
    assert repository["commit"] == pushed
    assert b"With 2 files as they are here: committed.txt, untracked.bin." in result.stderr
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
    assert set(before.splitlines()) < set(after.splitlines())  # what was staged, and what was not, stays so


@pytest.fixture
def edited(api, checkout):
    """The task edits the files that were sent along: one that git knows, one that it does not."""
    (checkout / "notes.txt").write_text("notes\n")
    git("add", "-A", ".", cwd=checkout)
    (checkout / "notes.txt").write_text("better notes\n")
    patch = git("diff", "--full-index", cwd=checkout).encode()
    git("reset", "-q", cwd=checkout)
    (checkout / "notes.txt").write_text("notes\n")
    play(api, patch)


def test_what_became_of_a_new_file_that_was_sent_along_is_applied(edited, sandbox, checkout):
    result = sandbox("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert (result.returncode, (checkout / "notes.txt").read_text()) == (0, "better notes\n"), result.stderr
    assert git("status", "--porcelain", cwd=checkout) == "?? notes.txt\n"


@pytest.mark.parametrize("changed", ["notes.txt", "src/app.py"])
def test_what_is_said_to_apply_it_later_works_beside_ones_own_changes(edited, api, sandbox, checkout, changed):
    api.on("GET", f"/tasks/{TASK}/artifacts/.sandbox%2Fmetadata.json", of_bytes(b"{}"))
    if changed != "notes.txt":
        (checkout / changed).write_text("print('mine')\n")
    result = sandbox("run", "Go.", "--include-dirty", "--no-apply", cwd=checkout)
    advice = f"sandbox task apply {TASK} --beside-changes"
    assert f"  Apply it:   {advice}\n" in result.stderr.decode()
    applied = sandbox(*advice.split()[1:], cwd=checkout)
    assert (applied.returncode, (checkout / "notes.txt").read_text()) == (0, "better notes\n"), applied.stderr
    assert b"beside your own changes" in applied.stderr


@pytest.mark.parametrize("marked", ["--skip-worktree", "--assume-unchanged"])
def test_what_git_was_told_to_overlook_is_not_sent_along(api, done, sandbox, checkout, marked):
    (checkout / "local.env").write_text("PASSWORD=\n")
    commit(checkout, "Add settings")
    push(checkout)
    git("update-index", marked, "local.env", cwd=checkout)
    (checkout / "local.env").write_text("PASSWORD=hunter2\n")
    (checkout / "src" / "app.py").write_text("print('changed')\n")
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(sent(api)["repository"]["patch"])
    assert (b"hunter2" in patch, b"changed" in patch) == (False, True)


def test_a_checkout_without_an_index_is_sent_along(api, done, sandbox, checkout):
    (checkout / ".git" / "index").unlink()
    (checkout / "src" / "app.py").write_text("print('changed')\n")
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(sent(api)["repository"]["patch"])
    assert (b"-print('hello')" in patch, b"+print('changed')" in patch) == (True, True)


def test_nothing_is_sent_along_where_everything_is_pushed(api, done, sandbox, checkout):
    assert sandbox("run", "Go.", "--include-dirty", cwd=checkout).returncode == 0
    assert "patch" not in sent(api)["repository"]


def test_more_than_can_be_sent_stops_it_and_says_what_to_do(api, sandbox, checkout):
    (checkout / "large.bin").write_bytes(os.urandom(600 * 1024))
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.asked) == (4, [])
    assert b"and 512.0 KiB can be sent" in result.stderr


def test_far_more_than_can_be_sent_stops_it_before_it_is_read(api, sandbox, checkout):
    (checkout / "small.bin").write_bytes(b"small")
    with (checkout / "core.1").open("wb") as file:
        file.truncate(300 * 1024**2)
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.asked) == (4, [])
    assert b"a patch of 512.0 KiB can be sent. The largest is core.1 (300.0 MiB)." in result.stderr


@pytest.mark.parametrize("name", ["checkout", 'a "checkout": mine'])
def test_what_is_sent_along_leaves_nothing_in_the_repository(api, done, sandbox, checkout, name):
    checkout = checkout.rename(checkout.with_name(name))
    (checkout / "untracked.bin").write_bytes(os.urandom(1000))
    before = git("count-objects", "-v", cwd=checkout)
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert b"untracked.bin" in base64.b64decode(sent(api)["repository"]["patch"])
    assert git("count-objects", "-v", cwd=checkout) == before


@pytest.fixture
def submodule(checkout):
    """A repository in the checkout, whose commit is one of the checkout's entries."""
    inner = checkout / "library"
    inner.mkdir()
    git("init", "-q", "-b", "main", ".", cwd=inner)
    (inner / "code.py").write_text("code\n")
    commit(inner)
    commit(checkout, "Take a library in")
    push(checkout)
    return inner


def test_changes_in_a_submodule_are_not_left_out_unseen(api, submodule, sandbox, checkout):
    (submodule / "code.py").write_text("better code\n")
    git("config", "diff.ignoreSubmodules", "all", cwd=checkout)
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.asked) == (4, [])
    assert b"The submodule library has changes of its own, which cannot be sent along." in result.stderr


def test_another_commit_of_a_submodule_is_sent_as_git_apply_takes_it(api, done, submodule, sandbox, checkout):
    (submodule / "code.py").write_text("better code\n")
    commit(submodule, "Improve")
    git("config", "diff.submodule", "log", cwd=checkout)
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert result.returncode == 0, result.stderr
    patch = base64.b64decode(sent(api)["repository"]["patch"])
    assert f"\n+Subproject commit {head(submodule)}\n".encode() in patch


def test_a_repository_in_the_checkout_is_not_sent_as_an_empty_directory(api, sandbox, checkout):
    (checkout / "below" / "nested").mkdir(parents=True)
    git("init", "-q", "-b", "main", ".", cwd=checkout / "below" / "nested")
    (checkout / "below" / "nested" / "file").write_text("x\n")
    commit(checkout / "below" / "nested")
    result = sandbox("run", "Go.", "--include-dirty", cwd=checkout)
    assert (result.returncode, api.asked) == (4, [])
    assert b"below/nested/ is a git repository of its own, which cannot be sent along." in result.stderr


def test_what_is_not_pushed_can_be_left_out_and_is_kept(api, done, sandbox, checkout):
    pushed = head(checkout)
    (checkout / "README.md").write_text("mine\n")
    commit(checkout, "Here only")
    (checkout / "README.md").write_text("mine too\n")
    result = sandbox("run", "Go.", "--leave-dirty", "--apply", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert sent(api)["repository"]["commit"] == pushed
    assert (checkout / "README.md").read_text() == "mine too\n"
    assert "Applied to 2 files, beside your own changes." in result.stderr.decode()
    assert (checkout / "new.txt").read_text() == "new\n"


def test_a_patch_that_does_not_fit_any_more_is_not_applied_in_part(api, done, sandbox, checkout):
    (checkout / "src" / "app.py").write_text("something else\n")
    result = sandbox("run", "Go.", "--leave-dirty", "--apply", cwd=checkout)
    assert result.returncode == 4
    assert not (checkout / "new.txt").exists()
    assert result.stderr.decode().endswith(f"  Look at it: sandbox task diff {TASK}\n")


def test_a_secret_in_the_patch_is_told_with_what_takes_it_without_another_task(api, done, sandbox, checkout):
    listed = [{"name": f"{TASK}.patch", "path": f".sandbox/{TASK}.patch", "contains_secret": True}]
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": listed}))
    result = sandbox("run", "Go.", "--apply", cwd=checkout)
    assert result.returncode == 5
    assert f"  Take it all the same: sandbox task apply {TASK} --allow-secrets\n" in result.stderr.decode()


@pytest.fixture
def switched(api, done, checkout):
    """Another branch is checked out while the task is at work."""

    def switch(_):
        git("checkout", "-q", "-b", "other", cwd=checkout)
        return of_frames(frames())

    api.on("GET", f"/tasks/{TASK}/logs", switch)


def test_what_was_checked_out_meanwhile_is_left_as_it_is(switched, sandbox, checkout):
    result = sandbox("run", "Go.", "--apply", cwd=checkout)
    assert (result.returncode, git("status", "--porcelain", cwd=checkout)) == (4, "")
    at = head(checkout)[:12]
    assert result.stderr.decode().splitlines()[-2:] == [
        f"Error: This checkout was at {at} (main) as the task began, and is at {at} (other) now. Nothing was applied.",
        f"  Apply it all the same: sandbox task apply {TASK}",
    ]


def test_what_is_switched_or_changed_while_somebody_is_asked_counts(done, on_terminal, terminal, checkout):
    git("branch", "another", cwd=checkout)
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    terminal.read_until(b"[y/n]:")
    git("switch", "-q", "another", cwd=checkout)
    terminal.type(b"y\n")
    assert b"Nothing was applied" in terminal.read_to_end(process)
    assert (process.returncode, (checkout / "new.txt").exists()) == (4, False)


def test_who_is_asked_is_told_that_something_else_is_checked_out(switched, on_terminal, terminal, checkout):
    process = on_terminal("run", "Say goodbye.", "--directory", str(checkout))
    shown = terminal.read_until(b"[y/n]:")
    assert b"as the task began, and" in shown
    terminal.type(b"y\n")
    terminal.read_to_end(process)
    assert (process.returncode, (checkout / "new.txt").exists()) == (0, True)


def test_a_task_that_failed_ends_with_its_reason_and_offers_nothing(api, done, sandbox, checkout):
    play(api, b"", "failed")
    result = sandbox("run", "Go.", "--apply", cwd=checkout)
    assert result.returncode == 1
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_a_task_that_changes_nothing_says_so(api, sandbox, checkout):
    play(api, b"")
    result = sandbox("run", "Look.", "--apply", cwd=checkout)
    assert (result.returncode, result.stderr.decode().splitlines()[-1]) == (0, "It changed nothing.")


@pytest.mark.parametrize(("option", "code"), [("--apply", 4), ("--no-apply", 0)])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_patch_that_could_not_be_made_is_not_told_as_no_change(api, sandbox, checkout, option, code, form):
    play(api, b"# truncated: it is larger than a patch may be (256 MiB)\n")
    result = sandbox("run", "Grow.", option, "-f", form, cwd=checkout)
    assert result.returncode == code
    if form == "json":
        told = json.loads(result.stdout.splitlines()[-1])
        assert told == {"type": "patch", "task_id": TASK, "applied": False, "files": []}
    assert b"  truncated: it is larger than a patch may be (256 MiB)\n" in result.stderr
    assert b"changed nothing" not in result.stderr


def test_untracked_files_stay_and_are_no_obstacle(done, sandbox, checkout):
    (checkout / "notes.txt").write_text("mine\n")
    result = sandbox("run", "Go.", cwd=checkout)
    assert result.returncode == 0
    assert "1 file that git does not track stays here." in result.stderr.decode()


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://me:s3cr3t@github.com/org/app.git", URL),
        ("git@github.com:org/app.git", "git@github.com:org/app.git"),
        ("short:app.git", URL),
    ],
)
def test_the_remotes_address_goes_without_credentials_and_abbreviations(api, done, sandbox, checkout, address, url):
    git("remote", "set-url", "origin", address, cwd=checkout)
    git("config", "url.https://github.com/org/.insteadOf", "short:", cwd=checkout)
    result = sandbox("run", "Go.", cwd=checkout)
    assert sent(api)["repository"]["url"] == url
    assert b"s3cr3t" not in result.stderr
    assert ("credentials" in result.stderr.decode()) == ("s3cr3t" in address)


def test_of_several_addresses_of_a_remote_the_one_that_git_fetches_from_is_cloned(api, done, sandbox, checkout):
    git("remote", "set-url", "--add", "origin", "https://mirror.example.org/app.git", cwd=checkout)
    assert sandbox("run", "Go.", cwd=checkout).returncode == 0
    assert sent(api)["repository"]["url"] == URL


def test_the_branch_that_is_followed_is_cloned_whatever_it_is_called_here(api, done, sandbox, checkout):
    git("checkout", "-q", "-b", "mine", cwd=checkout)
    git("remote", "add", "fork", "https://github.com/me/app.git", cwd=checkout)
    push(checkout, "feature/theirs", "fork")
    git("config", "branch.mine.remote", "fork", cwd=checkout)
    git("config", "branch.mine.merge", "refs/heads/feature/theirs", cwd=checkout)
    assert sandbox("run", "Go.", cwd=checkout).returncode == 0
    repository = sent(api)["repository"]
    assert (repository["url"], repository["branch"]) == ("https://github.com/me/app.git", "feature/theirs")


@pytest.mark.parametrize("detached", [False, True])
def test_a_commit_that_the_remote_has_in_another_branch_is_cloned_from_there(api, done, sandbox, checkout, detached):
    git("checkout", "-q", *(["--detach"] if detached else ["-b", "new"]), cwd=checkout)
    assert sandbox("run", "Go.", cwd=checkout).returncode == 0
    assert (sent(api)["repository"]["branch"], sent(api)["repository"]["commit"]) == ("main", head(checkout))


def break_off(directory):
    git("update-ref", "-d", "refs/remotes/origin/main", cwd=directory)


def add_another(directory):
    git("remote", "rename", "origin", "a", cwd=directory)
    git("remote", "add", "b", URL, cwd=directory)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda at: git("remote", "remove", "origin", cwd=at), "git remote add origin URL"),
        (
            lambda at: git("remote", "set-url", "origin", "/srv/app.git", cwd=at),
            "The address of origin must be https://",
        ),
        (break_off, "git push -u origin main"),
        (add_another, "--remote NAME"),
    ],
    ids=["no remote", "a path", "never pushed", "several remotes"],
)
def test_a_checkout_that_no_task_can_begin_from_says_what_to_do(api, sandbox, checkout, change, told):
    change(checkout)
    result = sandbox("run", "Go.", cwd=checkout)
    assert (result.returncode, api.asked) == (2, [])
    assert told in result.stderr.decode()


@pytest.mark.parametrize("way", ["monitor", "hook"])
def test_no_program_starts_because_it_lies_in_the_checkout(api, done, sandbox, checkout, way):
    ran = checkout.parent / "ran"
    program = checkout / ".git" / "hooks" / "post-index-change"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    if way == "monitor":
        program = program.rename(checkout / ".git" / "monitor")
        git("config", "core.fsmonitor", str(program), cwd=checkout)
    (checkout / "untracked.txt").write_text("new\n")
    result = sandbox("run", "Go.", "--include-dirty", "--apply", cwd=checkout)
    assert (result.returncode, ran.exists()) == (0, False), result.stderr
    assert (checkout / "new.txt").read_text() == "new\n"


def test_outside_of_a_checkout_it_says_where_that_is(sandbox, tmp_path):
    result = sandbox("run", "Go.")
    assert (result.returncode, f"{tmp_path} is not in a git checkout" in result.stderr.decode()) == (2, True)


def test_a_checkout_that_git_does_not_trust_is_told_in_gits_words(sandbox, checkout, environment):
    environment["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"
    result = sandbox("run", "Go.", cwd=checkout)
    assert result.returncode == 2
    told = result.stderr.decode()
    assert "dubious ownership" in told
    assert f"git config --global --add safe.directory {checkout}" in told
    assert "not in a git checkout" not in told
