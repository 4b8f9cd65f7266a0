"""Cloning fails with a sentence that says what to do, and lets no secret out."""

import asyncio
import base64
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from doubles.workspace_fixture import PUBLIC_URL, programs_below, run_git
from sandbox.model.errors import AttemptError
from sandbox.model.manifest.schema import Repository
from sandbox.workspace.clone import staging
from sandbox.workspace.git import directory
from sandbox.workspace.git.errors import SILENT_INDEX_PACK_ERROR


def complaint(house, *args, **wanted):
    with pytest.raises(AttemptError) as raised:
        house.stage(*args, **wanted)
    assert raised.value.code == "clone_failed"
    return raised.value.message


@pytest.mark.parametrize("is_confined", [True, False])
def test_no_pack_is_larger_than_the_disk_that_was_asked_for(house, is_confined):
    house.confined = is_confined
    house.upstream.commit({"random": os.urandom(600_000)})

    house.disk_bytes = 400_000
    assert "larger than a clone may be; raise vm.disk" in complaint(house)
    house.disk_bytes = 1_600_000
    house.stage()


def test_no_commit_has_more_than_the_disk_that_was_asked_for(house):
    house.upstream.commit({"zeros": bytes(600_000)})

    house.disk_bytes = 400_000
    assert "files of the commit are larger than" in complaint(house)
    house.disk_bytes = 1_600_000
    house.stage()


def test_a_branch_that_is_not_there(house):
    assert complaint(house, branch="nope") == (
        f"Cannot clone {PUBLIC_URL}: it has no branch 'nope'; check repository.branch."
    )


def test_a_tag_is_no_branch(house):
    run_git("push", "--quiet", str(house.upstream.bare), "HEAD:refs/tags/v1", directory=house.upstream.work)

    assert "'v1' is no branch" in complaint(house, branch="v1")


def test_an_empty_repository_has_no_branch(make_house):
    assert "no branch 'main'" in complaint(make_house())


def test_a_commit_of_another_branch(house):
    other = house.upstream.commit({"README.md": b"# Other\n"}, branch="other")

    assert f"Commit {other} is not on branch 'main'" in complaint(house, commit=other)
    house.stage(branch="other", commit=other)


def test_a_commit_that_does_not_exist(house):
    assert "is not on branch 'main'" in complaint(house, commit="0123456789")


def test_a_name_that_is_no_commit(house):
    blob = run_git("rev-parse", "HEAD:README.md", directory=house.upstream.work)

    assert "is not on branch 'main'" in complaint(house, commit=blob)


class Interfering:
    """A confinement in which one of git's commands says this and ends with that code, without being run."""

    def __init__(self, confinement, name, code, said, told):
        self.confinement, self.name, self.code, self.said, self.told = confinement, name, code, said, told

    def __getattr__(self, name):
        return getattr(self.confinement, name)

    async def run(self, command):
        if self.name not in command.argv:
            return await self.confinement.run(command)
        os.write(command.stderr, self.said)
        os.write(command.stdout, self.told)
        return self.code


@pytest.fixture
def interfere(house, monkeypatch):
    """Lets a command of git's end so, in the house's confinements."""
    real = house.confine

    def begin(name, code, *, said=b"", told=b""):
        @asynccontextmanager
        async def confine(directories, read_only):
            async with real(directories, read_only) as confinement:
                yield Interfering(confinement, name, code, said, told)

        monkeypatch.setattr(house, "confine", confine)

    return begin


MISSING = b"fatal: Remote branch main not found in upstream origin\n"


@pytest.mark.parametrize(
    ("code", "said", "waits"),
    [
        (137, b"", True),
        (128, SILENT_INDEX_PACK_ERROR.encode(), True),
        (128, MISSING, False),
        (128, b"fatal: unable to access: Connection refused\n", False),
    ],
)
def test_a_clone_whose_git_may_have_been_killed_fails_only_if_its_runner_lives_on(
    house, interfere, monkeypatch, code, said, waits
):
    """Who kills everything kills git first now and then; the runner, a moment later, has to have said nothing."""
    interfere("clone", code, said=said)
    monkeypatch.setattr(staging, "GIT_KILLED_GRACE_SECONDS", 60.0)

    async def play():
        repository = Repository(url=PUBLIC_URL, branch="main")
        work = asyncio.ensure_future(house.workspaces.stage(repository, house.attempt, house.confine, house.disk_bytes))
        done, _ = await asyncio.wait([work], timeout=4)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return not done

    assert asyncio.run(play()) is waits


FULL = b"fatal: write error: No space left on device\n"
HINDERED = [(137, b"", "not enough memory"), (127, b"", "git said: "), (139, b"", "git said: "), (128, FULL, "no room")]
NEW_FILE = b"diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+new\n"


@pytest.mark.parametrize("command", ["rev-parse", "merge-base"])
@pytest.mark.parametrize(("code", "said", "reason"), HINDERED)
def test_no_commit_is_blamed_for_what_the_machine_lacks(house, interfere, command, code, said, reason):
    tip = run_git("rev-parse", "HEAD", directory=house.upstream.work)
    interfere(command, code, said=said)

    message = complaint(house, commit=tip)

    assert reason in message
    assert "is not on branch" not in message


@pytest.mark.parametrize(("code", "said", "reason"), HINDERED)
def test_no_sent_work_is_blamed_for_what_the_machine_lacks(house, interfere, code, said, reason):
    interfere("apply", code, said=said)

    message = complaint(house, patch=base64.b64encode(NEW_FILE).decode())

    assert reason in message
    assert "does not apply" not in message


def test_a_commit_and_work_that_fit_are_taken_where_nothing_is_lacking(house):
    tip = run_git("rev-parse", "HEAD", directory=house.upstream.work)

    house.stage(commit=tip, patch=base64.b64encode(NEW_FILE).decode())

    assert (house.workspace / "new").read_bytes() == b"new\n"


def test_a_git_that_was_taken_over_names_no_commit(house, interfere):
    tip = run_git("rev-parse", "HEAD", directory=house.upstream.work)
    interfere("rev-parse", 0, told=b"\xff\xfe\n")

    assert "is not on branch 'main'" in complaint(house, commit=tip)


def test_a_repository_that_is_not_there(house):
    assert "there is no repository, or it needs credentials" in complaint(house, "https://git.example/other.git")


def test_a_host_that_lets_nobody_in(house):
    house.server.status = 403

    assert "put credentials into the git configuration of the server's user" in complaint(house)


def test_a_host_that_has_a_bad_day(house):
    house.server.status = 503

    assert "server error" in complaint(house)


def test_nobody_listens(house):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/x.git"

        assert "does not accept the connection" in complaint(house, url)


def test_a_name_that_does_not_resolve(house):
    assert "cannot be resolved" in complaint(house, "http://no-such-host.invalid/x.git")


@pytest.mark.parametrize("base", ["file://{bare}", "{bare}", "ext::sh -c 'touch {canary}' ", "git://127.0.0.1:1/"])
def test_only_three_protocols_even_by_redirection_of_the_user(house, base):
    canary = house.root / "canary"
    real = base.format(bare=house.upstream.bare, canary=canary)
    house.configure(f'[url "{real}"]\n\tinsteadOf = https://elsewhere.example/')

    assert "only https, http and ssh are allowed" in complaint(house, "https://elsewhere.example/")
    assert not canary.exists()


def test_the_first_request_may_be_redirected(house):
    with GitHttpServer(house.root).serving() as moved:
        moved.redirect = house.server.url

        house.stage(f"{moved.url}demo.git")

    assert (house.workspace / "README.md").exists()


def test_where_hosts_are_named_no_other_host_is_gone_to(house):
    house.follow_redirects = False
    with GitHttpServer(house.root).serving() as moved:
        moved.redirect = house.server.url

        assert "redirects to somewhere else" in complaint(house, f"{moved.url}demo.git")
        assert moved.requests
    assert house.server.requests == []
    house.stage(f"{house.server.url}demo.git")
    assert (house.workspace / "README.md").exists()


@pytest.mark.parametrize("there", [(), ("setpriv",)])
def test_programs_are_missing_on_the_server(house, there):
    programs = house.root / "programs"
    programs.mkdir()
    for name in there:
        (programs / name).symlink_to(shutil.which(name))
    house.variables = {**house.environment, "PATH": str(programs)}

    assert "lacks git or setpriv" in complaint(house)


def test_a_broken_configuration_of_the_user(house):
    house.configure("[broken")

    assert "Cannot clone" in complaint(house)


def test_no_secret_of_the_configuration_is_told(house):
    house.configure(
        f'[url "http://me:hunter2hunter2@127.0.0.1:1/"]\n\tinsteadOf = https://closed.example/\n'
        f'[http "{house.server.url}"]\n\textraHeader = Authorization: Basic c2VjcmV0OnNlY3JldA=='
    )
    house.server.status = 418

    said = [complaint(house), complaint(house, "https://closed.example/x.git")]

    assert "418" in said[0]
    assert not [text for text in said if "hunter2" in text or "c2VjcmV0" in text]


def test_other_settings_of_the_user_do_not_count(house):
    canary = house.root / "canary"
    hooks = house.root / "hooks"
    hooks.mkdir()
    hook = hooks / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {canary}\n")
    hook.chmod(0o755)
    for name in ("post-index-change", "reference-transaction"):
        (hooks / name).symlink_to(hook)
    house.configure(f"[core]\n\thooksPath = {hooks}\n\tautocrlf = true\n[init]\n\ttemplateDir = {hooks}")

    house.stage()

    assert not canary.exists()
    assert not (house.workspace / ".git" / "post-checkout").exists()
    assert (house.workspace / "README.md").read_bytes() == b"# Demo\n"


def test_a_commit_of_far_too_many_files_is_refused_before_checkout(house, monkeypatch):
    monkeypatch.setattr(staging, "ENTRIES_MAX", 50_000)  # of a hundred million
    work = house.upstream.work
    blob = run_git("hash-object", "-w", "--stdin", directory=work, stdin=b"bomb")
    lines = "".join(f"100644 blob {blob}\tf{number}\n" for number in range(10))
    for _level in range(7):
        tree = run_git("mktree", directory=work, stdin=lines.encode())
        lines = "".join(f"040000 tree {tree}\td{number}\n" for number in range(10))
    tree = run_git("mktree", directory=work, stdin=lines.encode())
    commit = run_git("commit-tree", "-m", "Bomb", tree, directory=work)
    run_git("push", "--quiet", "--force", str(house.upstream.bare), f"{commit}:refs/heads/bomb", directory=work)

    assert "more than 50000 files" in complaint(house, branch="bomb")
    assert list(house.workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("bound", "says"), [("PATH_BYTES_MAX", "path of the commit is longer than 2 bytes"), ("DEPTH_MAX", "too deeply")]
)
def test_a_commit_of_paths_that_nobody_can_work_with_is_refused_by_what_is_wrong(house, monkeypatch, bound, says):
    monkeypatch.setattr(staging, bound, 2)
    house.upstream.commit({"a/b/c/d": b""})

    assert says in complaint(house)


def test_a_disk_that_is_full_when_the_pack_is_copied(house, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "read_chunks", full)

    assert "raise vm.disk" in complaint(house)


def test_a_tree_with_a_git_directory_in_it_is_refused(house):
    work = house.upstream.work
    blob = run_git("hash-object", "-w", "--stdin", directory=work, stdin=b"[core]\n\tfsmonitor = touch canary\n")
    inner = run_git("mktree", directory=work, stdin=f"100644 blob {blob}\tconfig\n".encode())
    entry = b"40000 .git\0" + bytes.fromhex(inner)
    tree = run_git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", directory=work, stdin=entry)
    commit = run_git("commit-tree", "-m", "Sly", tree, directory=work)
    run_git("push", "--quiet", "--force", str(house.upstream.bare), f"{commit}:refs/heads/sly", directory=work)

    assert "objects that git refuses" in complaint(house, branch="sly")


def test_cancelling_ends_git_and_its_children(house):
    house.server.stall()
    repository = Repository(url=PUBLIC_URL, branch="main")

    async def cancel_while_git_waits():
        staging = asyncio.create_task(
            house.workspaces.stage(repository, house.attempt, house.confine, house.disk_bytes)
        )
        for _ in range(500):
            if house.server.requests:
                break
            await asyncio.sleep(0.01)
        assert b"bwrap" in programs_below(os.getpid())
        staging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(staging, 30)

    asyncio.run(cancel_while_git_waits())

    assert b"bwrap" not in programs_below(os.getpid())


def test_git_does_not_outlive_a_runner_that_is_killed(house):
    house.server.stall()
    program = (
        "import asyncio, json, sys; from pathlib import Path\n"
        "from sandbox.model.manifest.schema import Repository\n"
        "from sandbox.workspace.git.host_process import no_confinement\n"
        "from sandbox.workspace.workspaces import GitWorkspaces\n"
        "stage = GitWorkspaces(json.loads(sys.argv[1])).stage\n"
        "asyncio.run(stage(Repository(url=sys.argv[2], branch='main'), Path(sys.argv[3]), no_confinement, 10**9))\n"
    )
    arguments = [json.dumps(dict(house.environment)), PUBLIC_URL, str(house.attempt)]
    runner = subprocess.Popen([sys.executable, "-c", program, *arguments], cwd="/")
    try:
        assert becomes(lambda: house.server.requests)
        assert processes_with(str(house.attempt))
    finally:
        runner.kill()
        runner.wait()

    assert becomes(lambda: not [line for line in processes_with(str(house.attempt)) if b"clone" in line])
    house.server.go_on()
    assert becomes(lambda: processes_with(str(house.attempt)) == [])


def becomes(holds):
    """Whether it comes true within 10 s."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def processes_with(text):
    """Running processes that work in a directory below the path."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(text) and process.name != str(os.getpid()):
                found.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    return found
