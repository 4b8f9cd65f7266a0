"""Clone errors contain advice for the user but no secrets."""

import asyncio
import base64
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from doubles.workspace_harness import PUBLIC_URL, descendant_names, run_git
from sandbox.model.failure import AttemptError
from sandbox.model.manifest.schema import Repository
from sandbox.workspace.clone import clone_and_checkout, git_directory
from sandbox.workspace.git_command import SILENT_INDEX_PACK_ERROR


def clone_error(harness, *args, **source):
    with pytest.raises(AttemptError) as raised:
        harness.stage(*args, **source)
    assert raised.value.code == "clone_failed"
    return raised.value.message


@pytest.mark.parametrize("is_confined", [True, False])
def test_pack_larger_than_the_disk_is_refused(harness, is_confined):
    harness.confined = is_confined
    harness.upstream.commit({"random": os.urandom(600_000)})

    harness.disk_bytes = 400_000
    assert "larger than the size limit for clones; raise vm.disk" in clone_error(harness)
    harness.disk_bytes = 1_600_000
    harness.stage()


def test_commit_larger_than_the_disk_is_refused(harness):
    harness.upstream.commit({"zeros": bytes(600_000)})

    harness.disk_bytes = 400_000
    assert "files in the commit total more than" in clone_error(harness)
    harness.disk_bytes = 1_600_000
    harness.stage()


def test_missing_branch_fails_the_clone(harness):
    assert clone_error(harness, branch="nope") == (
        f"Cannot clone {PUBLIC_URL}: it has no branch 'nope'; check repository.branch."
    )


def test_tag_is_not_accepted_as_a_branch(harness):
    run_git("push", "--quiet", str(harness.upstream.bare), "HEAD:refs/tags/v1", directory=harness.upstream.work)

    assert "'v1' is not a branch" in clone_error(harness, branch="v1")


def test_empty_repository_has_no_branch(make_harness):
    assert "no branch 'main'" in clone_error(make_harness())


def test_commit_on_another_branch_is_refused(harness):
    other = harness.upstream.commit({"README.md": b"# Other\n"}, branch="other")

    assert f"Commit {other} is not on branch 'main'" in clone_error(harness, commit=other)
    harness.stage(branch="other", commit=other)


def test_unknown_commit_is_refused(harness):
    assert "is not on branch 'main'" in clone_error(harness, commit="0123456789")


def test_blob_is_not_accepted_as_a_commit(harness):
    blob = run_git("rev-parse", "HEAD:README.md", directory=harness.upstream.work)

    assert "is not on branch 'main'" in clone_error(harness, commit=blob)


class FailingConfinement:
    """A confinement that replaces one git command with the given output and exit code."""

    def __init__(self, confinement, name, code, stderr, stdout):
        self.confinement, self.name, self.code, self.stderr, self.stdout = confinement, name, code, stderr, stdout

    def __getattr__(self, name):
        return getattr(self.confinement, name)

    async def run(self, command):
        if self.name not in command.argv:
            return await self.confinement.run(command)
        os.write(command.stderr, self.stderr)
        os.write(command.stdout, self.stdout)
        return self.code


@pytest.fixture
def replace_command(harness, monkeypatch):
    """Replace a git command in the harness's confinements."""
    original_confine = harness.confine

    def replace(name, code, *, stderr=b"", stdout=b""):
        @asynccontextmanager
        async def confine(directories, read_only_directories):
            async with original_confine(directories, read_only_directories) as confinement:
                yield FailingConfinement(confinement, name, code, stderr, stdout)

        monkeypatch.setattr(harness, "confine", confine)

    return replace


MISSING = b"fatal: Remote branch main not found in upstream origin\n"


@pytest.mark.parametrize(
    ("code", "stderr", "is_pending"),
    [
        (137, b"", True),
        (128, SILENT_INDEX_PACK_ERROR.encode(), True),
        (128, MISSING, False),
        (128, b"fatal: unable to access: Connection refused\n", False),
    ],
)
async def test_clone_error_is_delayed_if_git_may_have_been_killed(
    harness, replace_command, monkeypatch, code, stderr, is_pending
):
    """If all processes are killed, git may die before the runner. The runner must not report this as an error."""
    replace_command("clone", code, stderr=stderr)
    monkeypatch.setattr(clone_and_checkout, "GIT_KILLED_GRACE_SECONDS", 60.0)

    async def scenario():
        repository = Repository(url=PUBLIC_URL, branch="main")
        staging_task = asyncio.ensure_future(
            harness.workspaces.stage(repository, harness.attempt_dir, harness.confine, harness.disk_bytes)
        )
        done, _ = await asyncio.wait([staging_task], timeout=4)
        staging_task.cancel()
        await asyncio.gather(staging_task, return_exceptions=True)
        return not done

    assert (await scenario()) is is_pending


FULL = b"fatal: write error: No space left on device\n"
HOST_ERRORS = [
    (137, b"", "too large for git's memory"),
    (127, b"", "git reported: "),
    (139, b"", "git reported: "),
    (128, FULL, "not enough disk space"),
]
NEW_FILE = b"diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+new\n"


@pytest.mark.parametrize("command", ["rev-parse", "merge-base"])
@pytest.mark.parametrize(("code", "stderr", "reason"), HOST_ERRORS)
def test_host_errors_are_not_reported_as_a_wrong_commit(harness, replace_command, command, code, stderr, reason):
    tip = run_git("rev-parse", "HEAD", directory=harness.upstream.work)
    replace_command(command, code, stderr=stderr)

    message = clone_error(harness, commit=tip)

    assert reason in message
    assert "is not on branch" not in message


@pytest.mark.parametrize(("code", "stderr", "reason"), HOST_ERRORS)
def test_host_errors_are_not_reported_as_a_wrong_patch(harness, replace_command, code, stderr, reason):
    replace_command("apply", code, stderr=stderr)

    message = clone_error(harness, patch=base64.b64encode(NEW_FILE).decode())

    assert reason in message
    assert "does not apply" not in message


def test_valid_commit_and_patch_are_accepted(harness):
    tip = run_git("rev-parse", "HEAD", directory=harness.upstream.work)

    harness.stage(commit=tip, patch=base64.b64encode(NEW_FILE).decode())

    assert (harness.workspace / "new").read_bytes() == b"new\n"


def test_invalid_output_of_a_compromised_git_is_not_accepted_as_a_commit(harness, replace_command):
    tip = run_git("rev-parse", "HEAD", directory=harness.upstream.work)
    replace_command("rev-parse", 0, stdout=b"\xff\xfe\n")

    assert "is not on branch 'main'" in clone_error(harness, commit=tip)


def test_missing_repository_is_reported(harness):
    assert "there is no repository, or it needs credentials" in clone_error(harness, "https://git.example/other.git")


def test_forbidden_access_is_reported(harness):
    harness.server.status = 403

    assert "give the server's user access" in clone_error(harness)


def test_server_error_is_reported(harness):
    harness.server.status = 503

    assert "server error" in clone_error(harness)


def test_refused_connection_is_reported(harness):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/x.git"

        assert "cannot be reached" in clone_error(harness, url)


def test_unresolvable_host_is_reported(harness):
    assert "cannot be resolved" in clone_error(harness, "http://no-such-host.invalid/x.git")


@pytest.mark.parametrize("base", ["file://{bare}", "{bare}", "ext::sh -c 'touch {canary}' ", "git://127.0.0.1:1/"])
def test_protocols_other_than_https_http_and_ssh_are_refused_after_url_rewrites(harness, base):
    canary = harness.root / "canary"
    rewritten_base = base.format(bare=harness.upstream.bare, canary=canary)
    harness.configure(f'[url "{rewritten_base}"]\n\tinsteadOf = https://elsewhere.example/')

    assert "only https, http and ssh are allowed" in clone_error(harness, "https://elsewhere.example/")
    assert not canary.exists()


def test_redirect_of_the_first_request_is_followed(harness):
    with GitHttpServer(harness.root).serving() as moved:
        moved.redirect = harness.server.url

        harness.stage(f"{moved.url}demo.git")

    assert (harness.workspace / "README.md").exists()


def test_redirect_to_another_host_is_refused_when_hosts_are_restricted(harness):
    harness.follow_redirects = False
    with GitHttpServer(harness.root).serving() as moved:
        moved.redirect = harness.server.url

        assert "redirects to another URL" in clone_error(harness, f"{moved.url}demo.git")
        assert moved.requests
    assert harness.server.requests == []
    harness.stage(f"{harness.server.url}demo.git")
    assert (harness.workspace / "README.md").exists()


@pytest.mark.parametrize("present", [(), ("setpriv",)])
def test_missing_programs_are_reported(harness, present):
    programs = harness.root / "programs"
    programs.mkdir()
    for name in present:
        (programs / name).symlink_to(shutil.which(name))
    harness.variables = {**harness.environment, "PATH": str(programs)}

    assert "lacks git or setpriv" in clone_error(harness)


def test_invalid_git_configuration_is_reported(harness):
    harness.configure("[broken")

    assert "Cannot clone" in clone_error(harness)


def test_errors_contain_no_secret_from_the_configuration(harness):
    harness.configure(
        f'[url "http://me:hunter2hunter2@127.0.0.1:1/"]\n\tinsteadOf = https://closed.example/\n'
        f'[http "{harness.server.url}"]\n\textraHeader = Authorization: Basic c2VjcmV0OnNlY3JldA=='
    )
    harness.server.status = 418

    errors = [clone_error(harness), clone_error(harness, "https://closed.example/x.git")]

    assert "418" in errors[0]
    assert not [text for text in errors if "hunter2" in text or "c2VjcmV0" in text]


def test_unrelated_git_settings_of_the_user_are_ignored(harness):
    canary = harness.root / "canary"
    hooks = harness.root / "hooks"
    hooks.mkdir()
    hook = hooks / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {canary}\n")
    hook.chmod(0o755)
    for name in ("post-index-change", "reference-transaction"):
        (hooks / name).symlink_to(hook)
    harness.configure(f"[core]\n\thooksPath = {hooks}\n\tautocrlf = true\n[init]\n\ttemplateDir = {hooks}")

    harness.stage()

    assert not canary.exists()
    assert not (harness.workspace / ".git" / "post-checkout").exists()
    assert (harness.workspace / "README.md").read_bytes() == b"# Demo\n"


def test_commit_with_too_many_files_is_refused_before_checkout(harness, monkeypatch):
    monkeypatch.setattr(clone_and_checkout, "ENTRIES_MAX", 50_000)  # the commit has a hundred million files
    work = harness.upstream.work
    blob = run_git("hash-object", "-w", "--stdin", directory=work, stdin=b"bomb")
    lines = "".join(f"100644 blob {blob}\tf{number}\n" for number in range(10))
    for _level in range(7):
        tree = run_git("mktree", directory=work, stdin=lines.encode())
        lines = "".join(f"040000 tree {tree}\td{number}\n" for number in range(10))
    tree = run_git("mktree", directory=work, stdin=lines.encode())
    commit = run_git("commit-tree", "-m", "Bomb", tree, directory=work)
    run_git("push", "--quiet", "--force", str(harness.upstream.bare), f"{commit}:refs/heads/bomb", directory=work)

    assert "more than 50000 files" in clone_error(harness, branch="bomb")
    assert list(harness.workspace.iterdir()) == []


@pytest.mark.parametrize(("levels", "is_refused"), [(12, True), (2, False)])
def test_commit_with_too_many_empty_directories_is_refused_before_checkout(harness, monkeypatch, levels, is_refused):
    monkeypatch.setattr(clone_and_checkout, "ENTRIES_MAX", 1000)  # with 12 levels, the commit has 10^12 directories
    work = harness.upstream.work
    tree = run_git("mktree", directory=work)
    for _level in range(levels):
        lines = "".join(f"040000 tree {tree}\td{number}\n" for number in range(10))
        tree = run_git("mktree", directory=work, stdin=lines.encode())
    commit = run_git("commit-tree", "-m", "Bomb", tree, directory=work)
    run_git("push", "--quiet", "--force", str(harness.upstream.bare), f"{commit}:refs/heads/bomb", directory=work)

    if is_refused:
        assert "more than 1000 files and directories" in clone_error(harness, branch="bomb")
    else:
        harness.stage(branch="bomb")
        assert harness.patch(commit) == b""
    assert [*harness.workspace.glob("d*")] == []


def push_nested_tree(harness, number_of_files, depth):
    """Push a commit in which each file has its own chain of parent directories.

    The chains are identical, so git stores each tree object only once.
    """
    work = harness.upstream.work
    blob = run_git("hash-object", "-w", "--stdin", directory=work, stdin=b"*.pyc\n")
    tree = run_git("mktree", directory=work, stdin=f"100644 blob {blob}\t.gitignore\n".encode())
    for _level in range(depth - 1):
        tree = run_git("mktree", directory=work, stdin=f"040000 tree {tree}\ta\n".encode())
    lines = "".join(f"040000 tree {tree}\t{number:03d}\n" for number in range(number_of_files))
    tree = run_git("mktree", directory=work, stdin=lines.encode())
    commit = run_git("commit-tree", "-m", "Nested", tree, directory=work)
    run_git("push", "--quiet", "--force", str(harness.upstream.bare), f"{commit}:refs/heads/nested", directory=work)


def test_commit_with_too_many_directories_is_refused_before_checkout(harness, monkeypatch):
    monkeypatch.setattr(clone_and_checkout, "ENTRIES_MAX", 1000)
    push_nested_tree(harness, number_of_files=50, depth=30)

    assert "more than 1000 files and directories" in clone_error(harness, branch="nested")
    assert list(harness.workspace.iterdir()) == []


def test_commit_with_many_directories_is_checked_out(harness, monkeypatch):
    monkeypatch.setattr(clone_and_checkout, "ENTRIES_MAX", 1600)
    push_nested_tree(harness, number_of_files=50, depth=30)

    harness.stage(branch="nested")

    assert (harness.workspace / "049" / "/".join(["a"] * 29) / ".gitignore").read_bytes() == b"*.pyc\n"


@pytest.mark.parametrize(
    ("bound", "message"), [("PATH_BYTES_MAX", "path in the commit is longer than 2 bytes"), ("DEPTH_MAX", "too deeply")]
)
def test_commit_with_unusable_paths_is_refused(harness, monkeypatch, bound, message):
    monkeypatch.setattr(clone_and_checkout, bound, 2)
    harness.upstream.commit({"a/b/c/d": b""})

    assert message in clone_error(harness)


def test_full_disk_during_the_copy_of_a_pack_is_reported(harness, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(git_directory, "read_chunks", full)

    assert "raise vm.disk" in clone_error(harness)


def test_tree_with_a_git_directory_is_refused(harness):
    work = harness.upstream.work
    blob = run_git("hash-object", "-w", "--stdin", directory=work, stdin=b"[core]\n\tfsmonitor = touch canary\n")
    inner = run_git("mktree", directory=work, stdin=f"100644 blob {blob}\tconfig\n".encode())
    entry = b"40000 .git\0" + bytes.fromhex(inner)
    tree = run_git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", directory=work, stdin=entry)
    commit = run_git("commit-tree", "-m", "Malformed", tree, directory=work)
    run_git("push", "--quiet", "--force", str(harness.upstream.bare), f"{commit}:refs/heads/malformed", directory=work)

    assert "contains malformed objects" in clone_error(harness, branch="malformed")


async def test_cancellation_ends_git_and_its_children(harness):
    harness.server.stall()
    repository = Repository(url=PUBLIC_URL, branch="main")

    async def cancel_while_git_waits():
        staging = asyncio.create_task(
            harness.workspaces.stage(repository, harness.attempt_dir, harness.confine, harness.disk_bytes)
        )
        for _ in range(500):
            if harness.server.requests:
                break
            await asyncio.sleep(0.01)
        assert b"bwrap" in descendant_names(os.getpid())
        staging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(staging, 30)

    await cancel_while_git_waits()

    assert b"bwrap" not in descendant_names(os.getpid())


def test_git_ends_when_the_runner_is_killed(harness):
    harness.server.stall()
    program = (
        "import asyncio, json, sys; from pathlib import Path\n"
        "from sandbox.model.manifest.schema import Repository\n"
        "from sandbox.workspace.no_confinement import no_confinement\n"
        "from sandbox.workspace.workspaces import GitWorkspaces\n"
        "stage = GitWorkspaces(json.loads(sys.argv[1])).stage\n"
        "asyncio.run(stage(Repository(url=sys.argv[2], branch='main'), Path(sys.argv[3]), no_confinement, 10**9))\n"
    )
    arguments = [json.dumps(dict(harness.environment)), PUBLIC_URL, str(harness.attempt_dir)]
    runner = subprocess.Popen([sys.executable, "-c", program, *arguments], cwd="/")
    try:
        assert is_met_in_time(lambda: harness.server.requests)
        assert command_lines_below(str(harness.attempt_dir))
    finally:
        runner.kill()
        runner.wait()

    assert is_met_in_time(
        lambda: not [line for line in command_lines_below(str(harness.attempt_dir)) if b"clone" in line]
    )
    harness.server.resume()
    assert is_met_in_time(lambda: command_lines_below(str(harness.attempt_dir)) == [])


def is_met_in_time(condition):
    """Return whether the condition becomes true within 10 s."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def command_lines_below(text):
    """Return the command lines of running processes whose working directory is under the path."""
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(text) and process.name != str(os.getpid()):
                command_lines.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    return command_lines


class RecordingConfinement(FailingConfinement):
    """A confinement that records which of git's open files are sockets, and fails."""

    def __init__(self, confinement, socket_flags):
        super().__init__(confinement, "clone", 128, b"fatal: not cloned\n", b"")
        self.socket_flags = socket_flags

    async def run(self, command):
        if self.name in command.argv:
            files = (command.stdin, command.stdout, command.stderr, *command.descriptors)
            self.socket_flags += [stat.S_ISSOCK(os.fstat(one).st_mode) for one in files]
        return await super().run(command)


def test_confined_git_has_no_socket_to_the_runner(harness, monkeypatch):
    """Through a socket, a compromised git could pass the runner a connection that blocks when the runner closes it."""
    original_confine, socket_flags = harness.confine, []

    @asynccontextmanager
    async def confine(directories, read_only_directories):
        async with original_confine(directories, read_only_directories) as confinement:
            yield RecordingConfinement(confinement, socket_flags)

    monkeypatch.setattr(harness, "confine", confine)
    assert "not cloned" in clone_error(harness)
    assert len(socket_flags) > 3
    assert not any(socket_flags)
