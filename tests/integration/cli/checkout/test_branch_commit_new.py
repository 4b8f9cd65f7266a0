"""`sandbox task apply --branch --push`: commits on new branches, pushed with real git over HTTP."""

import hashlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import quote

import pytest

from doubles.deployment import git, make_repository, wait_until
from doubles.fake_api import ApiResponse, json_response
from doubles.git_http_server import GitHttpServer
from doubles.sample_task import TASK_ID, task_status

FILES = {"a.txt": "one\ntwo\n", "b.txt": "b\n"}
FINAL_MESSAGE = "Fixed the second line.\n\n- `a.txt`: wrote \x1b[31mzwei\x1b[m.\n\nSandbox-Task: forged\n"


@pytest.fixture
def git_server(tmp_path):
    with GitHttpServer(tmp_path / "remotes").serving() as server:
        yield server


@pytest.fixture
def bare(tmp_path):
    """The remote repository, which accepts pushes over HTTP."""
    bare = tmp_path / "remotes" / "org" / "app.git"
    make_repository(bare, FILES)
    git("config", "http.receivepack", "true", cwd=bare)
    return bare


@pytest.fixture
def checkout(tmp_path, bare, git_server, environment):
    """A checkout with an unstaged change, a staged change and an untracked file; the user has a git identity."""
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = Ada\n\temail = ada@example.org\n")
    environment["NO_PROXY"] = "127.0.0.1"  # git must not use the proxy that is configured for the CLI
    directory = tmp_path / "checkout"
    git("clone", "-q", f"{git_server.url}org/app.git", str(directory), cwd=tmp_path)
    (directory / "a.txt").write_text("my change\n")
    (directory / "staged.txt").write_text("staged\n")
    git("add", "staged.txt", cwd=directory)
    (directory / "untracked.txt").write_text("untracked\n")
    return directory


@pytest.fixture
def base(bare):
    return git("rev-parse", "main", cwd=bare).strip()


def make_patch(bare, tmp_path, files: dict[str, str], start: str = "main") -> bytes:
    """Return the patch of a task that wrote these files on top of a commit from the remote."""
    work = tmp_path / "work of the agent"
    git("clone", "-q", str(bare), str(work), cwd=tmp_path)
    git("checkout", "-q", start, cwd=work)
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    git("add", "-A", "-f", ".", cwd=work)
    return git("diff", "--cached", "--binary", "--full-index", cwd=work).encode()


@pytest.fixture
def serve_task(api, serve_patch, git_server):
    """Serve a patch and its task. The task has a final message and names its repository."""

    def serve(patch: bytes, base: str | None, repository: Mapping[str, str] = MappingProxyType({})) -> None:
        serve_patch(patch, base)
        cloned = {"url": f"{git_server.url}org/app.git", "branch": "main", **repository}
        status = task_status("completed", definition={"repository": cloned}, final_message=FINAL_MESSAGE)
        api.on("GET", f"/tasks/{TASK_ID}", json_response(status))

    return serve


@pytest.fixture
def task(bare, tmp_path, serve_task, base):
    """A task that changed a file and added another file."""
    serve_task(make_patch(bare, tmp_path, {"a.txt": "one\nzwei\n", "new.txt": "new\n"}), base)


@pytest.fixture
def apply(run_cli, checkout):
    """Run `sandbox task apply` in the checkout."""

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return run_cli("task", "apply", TASK_ID, *arguments, cwd=checkout)

    return run


def snapshot(directory) -> tuple[object, ...]:
    """Return everything that a failed command must not change: files, index, references, reflogs and configuration."""
    logs = {path: path.read_bytes() for path in (directory / ".git" / "logs").rglob("*") if path.is_file()}
    return (
        git("status", "--porcelain=v2", "--branch", cwd=directory),
        {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()},
        git("for-each-ref", cwd=directory),
        (directory / ".git" / "HEAD").read_text(),
        (directory / ".git" / "config").read_text(),
        (directory / ".git" / "FETCH_HEAD").exists(),
        logs,
    )


BRANCH_OPTIONS = ("--branch", "fix/two")
PUSH = (*BRANCH_OPTIONS, "--push")


@pytest.mark.parametrize("option", [(), ("--commit",)])
def test_commit_on_a_new_branch_leaves_the_working_tree_alone(apply, task, checkout, base, option):
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS, *option)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().splitlines() == ["+1 -1  a.txt", "+1 -0  new.txt"]
    commit = git("rev-parse", "fix/two", cwd=checkout).strip()
    assert result.stderr.decode().splitlines() == [
        f"Committed to the new branch fix/two as {commit[:12]}. Your working tree did not change.",
        "  See it:  git show fix/two",
        "  Push it: git push -u origin fix/two",
    ]
    assert git("rev-parse", "fix/two^", cwd=checkout).strip() == base
    assert git("show", "fix/two:a.txt", cwd=checkout) == "one\nzwei\n"
    assert git("log", "-1", "--format=%an <%ae>%n%B", "fix/two", cwd=checkout).strip().splitlines() == [
        "Ada <ada@example.org>",
        "Fix bug #42",
        "",
        "Fixed the second line.",
        "",
        r"- `a.txt`: wrote \x1b[31mzwei\x1b[m.",
        "",
        "Sandbox-Task: forged",
        "",
        f"Sandbox-Task: {TASK_ID}",
    ]
    trailers = git("log", "-1", "--format=%(trailers:key=Sandbox-Task)", "fix/two", cwd=checkout).strip()
    assert trailers == f"Sandbox-Task: {TASK_ID}"
    git("branch", "-q", "-D", "fix/two", cwd=checkout)
    assert snapshot(checkout) == before


def test_missing_base_commit_is_fetched(apply, bare, tmp_path, checkout, serve_task):
    work = tmp_path / "colleague"
    git("clone", "-q", str(bare), str(work), cwd=tmp_path)
    (work / "c.txt").write_text("c\n")
    git("add", "c.txt", cwd=work)
    git("commit", "-q", "-m", "Continue", cwd=work)
    git("push", "-q", "origin", "HEAD:other", cwd=work)
    later = git("rev-parse", "HEAD", cwd=work).strip()
    serve_task(make_patch(bare, tmp_path, {"c.txt": "C\n"}, later), later, {"branch": "other"})
    result = apply(*BRANCH_OPTIONS, "--format", "json")
    assert result.returncode == 0, result.stderr
    created = json.loads(result.stdout)["branch"]
    assert created == {"name": "fix/two", "commit": created["commit"], "pushed_to": None, "pull_request_url": None}
    assert git("rev-parse", "fix/two", "fix/two^", cwd=checkout).split() == [created["commit"], later]
    assert "other" not in git("for-each-ref", cwd=checkout)


@pytest.mark.parametrize("branch", ["other:refs/heads/mine", "*:refs/heads/*", "mine\0", "other", "fix/other"])
def test_fetching_the_branch_of_the_task_moves_no_local_branch(
    apply, bare, tmp_path, checkout, serve_task, base, branch
):
    work = tmp_path / "colleague"
    git("clone", "-q", str(bare), str(work), cwd=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "Continue", cwd=work)
    git("push", "-q", "origin", "HEAD:other", "HEAD:fix/other", cwd=work)
    git("branch", "-q", "mine", base, cwd=checkout)
    serve_task(make_patch(bare, tmp_path, {"a.txt": "A\n"}), "1" * 40, {"branch": branch})
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS)
    assert result.returncode == 4, result.stderr
    assert f"has the task's commit {'1' * 12}." in result.stderr.decode()
    assert snapshot(checkout) == before


def test_base_commit_is_fetched_with_its_branch(apply, bare, git_server, tmp_path, checkout, serve_task):
    """A git server that does not serve commits by id still serves branches."""
    git("config", "uploadpack.allowAnySHA1InWant", "false", cwd=bare)
    git("config", "protocol.version", "0", cwd=checkout)
    work = tmp_path / "colleague"
    git("clone", "-q", str(bare), str(work), cwd=tmp_path)
    for message in ("Continue", "Continue again"):
        git("commit", "-q", "--allow-empty", "-m", message, cwd=work)
    git("push", "-q", "origin", "HEAD:fix/other", cwd=work)
    earlier = git("rev-parse", "HEAD^", cwd=work).strip()
    serve_task(make_patch(bare, tmp_path, {"a.txt": "A\n"}), earlier, {"branch": "fix/other"})
    result = apply(*BRANCH_OPTIONS)
    assert result.returncode == 0, result.stderr
    assert git("rev-parse", "fix/two^", cwd=checkout).strip() == earlier


def test_branch_is_pushed_with_the_credentials_of_the_user(apply, task, checkout, bare, git_server, tmp_path):
    git_server.credentials = "ada:secret"
    helper = "!f() { echo username=ada; echo password=secret; }; f"
    (tmp_path / ".gitconfig").write_text(
        f'[user]\n\tname = Ada\n\temail = a@example.org\n[credential]\n\thelper = "{helper}"\n'
    )
    result = apply(*PUSH)
    assert result.returncode == 0, result.stderr
    commit = git("rev-parse", "fix/two", cwd=checkout).strip()
    assert git("rev-parse", "fix/two", cwd=bare).strip() == commit
    assert git("rev-parse", "--abbrev-ref", "fix/two@{upstream}", cwd=checkout).strip() == "origin/fix/two"
    message = f"Committed to the new branch fix/two as {commit[:12]}, and pushed to origin.\n"
    assert result.stderr.decode() == message


def test_rejected_credentials_change_nothing(apply, task, checkout, bare, git_server):
    git_server.credentials = "ada:secret"
    before = snapshot(checkout)
    result = apply(*PUSH)
    assert result.returncode == 4
    assert result.stderr.startswith(b"Error: git could not push to origin, so no branch was created.\n  ")
    assert result.stderr.endswith(b"\n  Create the branch only here: leave out --push\n")
    assert (snapshot(checkout), git("branch", cwd=bare).split()) == (before, ["*", "main"])


@pytest.mark.parametrize("start", ["main~0", "main^{tree}"])
def test_existing_remote_branch_is_never_changed(apply, task, checkout, bare, start):
    if start.endswith("{tree}"):  # unrelated history
        start = git("commit-tree", "-m", "Other", "main^{tree}", cwd=bare).strip()
    git("update-ref", "refs/heads/fix/two", start, cwd=bare)
    there, before = git("rev-parse", "fix/two", cwd=bare), snapshot(checkout)
    result = apply(*PUSH)
    assert (result.returncode, result.stderr.decode()) == (
        4,
        "Error: The branch fix/two already exists on origin, so nothing was changed.\n"
        "  Choose another name: --branch fix/two-2\n",
    )
    assert (git("rev-parse", "fix/two", cwd=bare), snapshot(checkout)) == (there, before)


def test_existing_branch_is_never_changed(apply, task, checkout, api):
    git("branch", "fix/two", cwd=checkout)
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS)
    assert (result.returncode, snapshot(checkout), api.requests) == (4, before, [])
    assert b"already exists in this checkout" in result.stderr


def test_branch_without_a_commit_counts_as_existing(apply, task, checkout):
    """HEAD refers to the branch. If the branch were created, the files of this working tree would look deleted."""
    git("checkout", "-q", "--orphan", "fix/two", cwd=checkout)
    result = apply(*BRANCH_OPTIONS)
    assert result.returncode == 4
    assert b"already exists in this checkout" in result.stderr


@pytest.mark.parametrize(
    "name", ["-x", "a..b", "a b", "@{-1}", "HEAD", "refs/heads/x.lock", "", "a\x1b[31m", "x/", "../x"]
)
def test_invalid_name_is_a_usage_error(apply, task, checkout, api, name):
    before = snapshot(checkout)
    result = apply("--branch", name)
    assert (result.returncode, snapshot(checkout), api.requests) == (2, before, [])
    assert b"\x1b" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--commit",), ("--push",), ("--remote", "origin"), (*BRANCH_OPTIONS, "--beside-changes")],
)
def test_incomplete_options_are_usage_errors(apply, task, arguments):
    result = apply(*arguments)
    assert result.returncode == 2
    assert b"Error: " in result.stderr


def test_name_below_an_existing_branch_fails(apply, task, checkout):
    git("branch", "fix", cwd=checkout)
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS)
    assert (result.returncode, snapshot(checkout)) == (4, before)
    assert b"git could not create the branch fix/two." in result.stderr


def test_patch_that_does_not_apply_changes_nothing(apply, checkout, serve_task, base):
    patch = b"diff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-other\n+text\n"
    serve_task(patch, base)
    before = snapshot(checkout)
    result = apply(*PUSH)
    assert (result.returncode, snapshot(checkout)) == (4, before)
    sentence = f"Error: The patch does not apply to commit {base[:12]}, so no branch was created.\n"
    assert result.stderr.decode().startswith(sentence)


def test_unknown_base_commit_changes_nothing(apply, checkout, serve_task, bare, tmp_path):
    patch = make_patch(bare, tmp_path, {"a.txt": "x\n"})
    serve_task(patch, "1234567890" * 4)
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS)
    assert (result.returncode, snapshot(checkout)) == (4, before)
    assert b"Neither this checkout nor its remote origin has the task's commit 123456789012." in result.stderr


@pytest.mark.parametrize(("sent", "word"), [({"patch": "sha256:1234"}, "were not pushed"), ({}, "is not known")])
def test_task_with_an_unpublished_base_cannot_become_a_branch(apply, serve_task, bare, tmp_path, sent, word):
    base = git("rev-parse", "main", cwd=bare).strip() if sent else None
    serve_task(make_patch(bare, tmp_path, {"a.txt": "x\n"}), base, repository=sent)
    result = apply(*BRANCH_OPTIONS)
    assert result.returncode == 4
    assert word in result.stderr.decode()
    assert f"sandbox task apply {TASK_ID}" in result.stderr.decode()


@pytest.fixture
def chain_task(api, serve_task, bare, tmp_path, base):
    """A continuation whose own patch does not apply to a checkout without the earlier task's changes."""
    patch = b"diff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-first\n+first and second\n"
    serve_task(patch, "1234567890" * 4)
    repository = {"url": "https://example.org/x.git", "branch": "main", "commit": base}
    status = task_status("completed", parent="fix-41", definition={"repository": repository})
    api.on("GET", f"/tasks/{TASK_ID}", json_response(status))
    chain = make_patch(bare, tmp_path, {"a.txt": "first and second\n"})
    path = f".sandbox/{TASK_ID}.chain.patch"
    checksum = {"X-Checksum-SHA256": hashlib.sha256(chain).hexdigest()}
    route = f"/tasks/{TASK_ID}/artifacts/{quote(path, safe='')}"
    api.on("GET", route, lambda _: ApiResponse(200, [chain], checksum))
    names = (f"{TASK_ID}.chain.patch", f"{TASK_ID}.patch", "metadata.json")
    entries = [{"name": name, "path": f".sandbox/{name}", "contains_secret": False} for name in names]
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": entries}))
    return chain


def test_continuation_becomes_one_commit_with_the_patch_of_the_chain(apply, chain_task, bare, base):
    result = apply(*PUSH)
    assert result.returncode == 0, result.stderr
    assert git("rev-parse", "fix/two^", cwd=bare).strip() == base
    assert git("show", "fix/two:a.txt", cwd=bare) == "first and second\n"


def test_message_of_a_chain_names_the_first_task_and_every_later_task(apply, chain_task, api, bare, base, checkout):
    repository = {"url": "https://example.org/x.git", "branch": "main", "commit": base}
    definition = {"repository": repository}
    earlier = {"fix-40": (None, "## Done\n\nAdded a basket.\nMore."), "fix-41": ("fix-40", "Fixed prices.")}
    for task_id, (parent, message) in earlier.items():
        status = task_status("completed", parent=parent, final_message=message, id=task_id, name=f"Name of {task_id}")
        api.on("GET", f"/tasks/{task_id}", json_response(status))
    last = task_status("completed", parent="fix-41", definition=definition, final_message="Add tests.", name="Last")
    api.on("GET", f"/tasks/{TASK_ID}", json_response(last))
    result = apply(*BRANCH_OPTIONS, "--chain")
    assert result.returncode == 0, result.stderr
    assert b"Committed the changes of 3 tasks to the new branch fix/two as " in result.stderr
    assert git("log", "-1", "--format=%B", "fix/two", cwd=checkout).strip() == (
        f"Name of fix-40\n\n- Added a basket.\n- Fixed prices.\n- Add tests.\n\nSandbox-Task: {TASK_ID}"
    )


def test_subject_of_a_chain_is_the_name_of_the_first_task(apply, chain_task, api, base, checkout):
    prompt = "The tests fail. Find the bug, fix it, and add a test for the missing price in the basket.\nBe brief."
    definition = {
        "repository": {"url": "https://example.org/x.git", "branch": "main", "commit": base},
        "claude": {"prompt": prompt},
    }
    named = {"name": "The tests fail. Find the bug, fix it, and add a test…", "definition": definition}
    first = task_status("completed", parent=None, final_message="The bug is fixed.", id="fix-40", **named)
    api.on("GET", "/tasks/fix-40", json_response(first))
    last = task_status("completed", parent="fix-40", final_message="Added a test.", **named)
    api.on("GET", f"/tasks/{TASK_ID}", json_response(last))
    result = apply(*BRANCH_OPTIONS, "--chain")
    assert result.returncode == 0, result.stderr
    message = git("log", "-1", "--format=%B", "fix/two", cwd=checkout).strip()
    assert message == (
        "The tests fail. Find the bug, fix it, and add a test\n\n"
        "The tests fail. Find the bug, fix it, and add a test…\n\n"
        f"- The bug is fixed.\n- Added a test.\n\nSandbox-Task: {TASK_ID}"
    )


def test_changes_of_a_whole_chain_are_applied_to_the_working_tree(apply, chain_task, checkout):
    git("stash", "-q", "-u", cwd=checkout)
    before = snapshot(checkout)
    result = apply()
    assert (result.returncode, snapshot(checkout)) == (4, before)
    *error, remedy = result.stderr.decode().splitlines()
    assert remedy == f"  Apply all: sandbox task apply {TASK_ID} --chain"
    assert error[-1] == "  The patch does not contain the changes of the earlier tasks that this one continues."
    assert "Error: The patch does not apply to this checkout, so nothing was applied." in error

    result = apply("--chain")
    assert result.returncode == 0, result.stderr
    assert (checkout / "a.txt").read_text() == "first and second\n"
    assert "Apply all" not in result.stderr.decode()


@pytest.fixture
def earlier_changes_applied(chain_task, checkout):
    """The earlier task's changes are already committed in the checkout."""
    git("stash", "-q", "-u", cwd=checkout)
    (checkout / "a.txt").write_text("first\n")
    git("commit", "-qam", "First", cwd=checkout)


@pytest.mark.usefixtures("earlier_changes_applied")
def test_chain_whose_earlier_changes_are_already_applied_is_rejected_with_a_remedy(apply, checkout):
    before = snapshot(checkout)
    result = apply("--chain")
    assert (result.returncode, snapshot(checkout)) == (4, before)
    assert "  The earlier changes are already here: leave out --chain\n" in result.stderr.decode()


@pytest.mark.usefixtures("earlier_changes_applied")
@pytest.mark.parametrize("options", [(), ("--beside-changes",)])
def test_last_changes_of_a_chain_are_applied_on_top_of_earlier_ones(apply, checkout, options):
    result = apply(*options)
    assert result.returncode == 0, result.stderr
    assert (checkout / "a.txt").read_text() == "first and second\n"
    assert b"Apply all" not in result.stderr


def test_chain_that_conflicts_with_the_checkout_is_rejected_without_the_remedy_for_applied_changes(
    apply, chain_task, checkout
):
    git("stash", "-q", "-u", cwd=checkout)
    (checkout / "a.txt").write_text("other\n")
    git("commit", "-qam", "Other", cwd=checkout)
    result = apply("--chain")
    assert result.returncode == 4
    assert b"leave out --chain" not in result.stderr


def test_patch_that_applies_without_earlier_changes_is_applied_with_a_note(apply, api, chain_task, checkout):
    """The checkout lacks the changes of the earlier task, but the patch of the last task applies without them."""
    git("stash", "-q", "-u", cwd=checkout)
    own = b"diff --git a/c.txt b/c.txt\nnew file mode 100644\n--- /dev/null\n+++ b/c.txt\n@@ -0,0 +1 @@\n+b\n"
    checksum = {"X-Checksum-SHA256": hashlib.sha256(own).hexdigest()}
    route = f"/tasks/{TASK_ID}/artifacts/{quote(f'.sandbox/{TASK_ID}.patch', safe='')}"
    api.on("GET", route, lambda _: ApiResponse(200, [own], checksum))
    result = apply()
    assert result.returncode == 0, result.stderr
    assert (checkout / "c.txt").exists()
    assert result.stderr.decode().splitlines()[-1] == f"  Apply all: sandbox task apply {TASK_ID} --chain"


def test_diff_of_a_whole_chain_includes_the_changes_of_earlier_tasks(run_cli, chain_task):
    assert run_cli("task", "diff", TASK_ID, "--chain").stdout == chain_task
    assert run_cli("task", "diff", TASK_ID).stdout.endswith(b"+first and second\n")


def test_chain_option_without_a_parent_selects_the_patch_of_the_task(apply, run_cli, task, checkout):
    git("stash", "-q", "-u", cwd=checkout)
    assert run_cli("task", "diff", TASK_ID, "--chain").stdout == run_cli("task", "diff", TASK_ID).stdout != b""
    assert apply("--chain").returncode == 0
    assert (checkout / "a.txt").read_text() == "one\nzwei\n"


def test_missing_git_identity_is_reported_with_a_remedy(apply, task, checkout, tmp_path):
    (tmp_path / ".gitconfig").write_text("[user]\n\tuseConfigOnly = true\n")
    before = snapshot(checkout)
    result = apply(*BRANCH_OPTIONS)
    assert (result.returncode, snapshot(checkout)) == (4, before)
    assert b"git config user.name NAME" in result.stderr


def test_hooks_and_filters_of_the_patch_do_not_run(apply, checkout, serve_task, bare, tmp_path, base):
    """Some tools configure a hooks directory in the working tree. Git must not run hooks that the patch adds there."""
    marker = tmp_path / "ran"
    hooks = ("pre-commit", "commit-msg", "post-commit", "pre-push", "reference-transaction", "post-checkout")
    files = {f".githooks/{name}": f"#!/bin/sh\ntouch {marker}\n" for name in hooks}
    files[".gitattributes"] = "* filter=evil\n"
    git("config", "core.hooksPath", ".githooks", cwd=checkout)
    git("config", "filter.evil.clean", f"touch {marker}; cat", cwd=checkout)
    git("config", "filter.evil.smudge", f"touch {marker}; cat", cwd=checkout)
    serve_task(make_patch(bare, tmp_path, files).replace(b"mode 100644", b"mode 100755"), base)
    result = apply(*PUSH)
    assert result.returncode == 0, result.stderr
    assert not marker.exists()
    assert git("show", "fix/two:.githooks/pre-push", cwd=bare).startswith("#!/bin/sh")


def test_hook_of_the_user_runs_before_the_push(apply, task, checkout, bare):
    """The control: the user's own hook can stop the push."""
    hook = checkout / ".git" / "hooks" / "pre-push"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'not today' >&2\nexit 1\n")
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    before = snapshot(checkout)
    result = apply(*PUSH)
    assert (result.returncode, snapshot(checkout), git("branch", cwd=bare).split()) == (4, before, ["*", "main"])
    assert b"not today" in result.stderr


@pytest.mark.parametrize("path", ["../escaped", ".git/hooks/pre-push", "/tmp/escaped-from-a-branch"])
def test_patch_cannot_leave_the_repository(apply, checkout, serve_task, base, tmp_path, path):
    patch = f"diff --git a/{path} b/{path}\nnew file mode 100755\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+owned\n"
    serve_task(patch.encode(), base)
    before = snapshot(checkout)
    assert (apply(*BRANCH_OPTIONS).returncode, snapshot(checkout)) == (4, before)
    assert not (tmp_path / "escaped").exists()


def test_interrupted_push_deletes_the_branch(start_cli, task, checkout, git_server, environment, apply, tmp_path):
    git_server.stall()
    before = snapshot(checkout)
    options = {"start_new_session": True, "stderr": subprocess.PIPE}
    process = start_cli("task", "apply", TASK_ID, *PUSH, cwd=checkout, **options)
    branch = checkout / ".git" / "refs" / "heads" / "fix" / "two"
    wait_until(branch.exists, description="the branch")
    wait_until(lambda: any("receive-pack" in one for one in git_server.requests), description="the push")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    git_server.resume()
    assert (process.returncode, snapshot(checkout)) == (130, before)
    assert apply(*BRANCH_OPTIONS).returncode == 0


def test_task_without_changes_creates_no_branch(apply, checkout, serve_task, base):
    serve_task(b"", base)
    before = snapshot(checkout)
    result = apply(*PUSH)
    assert (result.returncode, snapshot(checkout)) == (0, before)
    assert b"changed nothing" in result.stderr


def test_branch_is_pushed_to_the_fork_and_its_base_is_fetched_from_upstream(
    apply, task, checkout, bare, git_server, tmp_path, base
):
    fork = tmp_path / "remotes" / "ada" / "app.git"
    make_repository(fork, {"other": "x"})
    git("config", "http.receivepack", "true", cwd=fork)
    git("remote", "rename", "origin", "upstream", cwd=checkout)
    git("remote", "add", "origin", f"{git_server.url}ada/app.git", cwd=checkout)
    result = apply(*PUSH)
    assert result.returncode == 0, result.stderr
    assert git("rev-parse", "fix/two^", cwd=fork).strip() == base


@pytest.mark.usefixtures("task")
def test_message_about_a_commit_is_wrapped_between_words(on_terminal, terminal, checkout):
    terminal.resize(80)
    text = terminal.read_to_end(
        on_terminal("task", "apply", TASK_ID, *BRANCH_OPTIONS, "--no-color", cwd=checkout)
    ).decode()
    lines = text.replace("\r", "").splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("Committed to the new branch fix/two as "))
    assert lines[at].endswith(". Your working tree did not")
    assert lines[at + 1 : at + 3] == ["  change.", "  See it:  git show fix/two"]
