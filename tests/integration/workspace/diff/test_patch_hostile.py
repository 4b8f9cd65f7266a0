"""Creating a patch from hostile files runs no program, follows no link and reads nothing outside the workspace."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys

import pytest

from doubles.workspace_harness import descendant_names, run_git
from sandbox.model.failure import AttemptError
from sandbox.runtimes import sandbox_filesystem
from sandbox.workspace import rooted_files


@pytest.fixture
def staged(harness):
    """The harness, with a workspace and its base commit."""
    harness.base_commit = harness.stage()
    return harness


def trap(harness):
    """Return the path of a canary file, and a program that creates the file when it runs."""
    canary = harness.root / "canary"
    program = harness.root / "trap"
    program.write_text(f"#!/bin/sh\ntouch {canary}\ncat\n")
    program.chmod(0o755)
    return canary, program


def test_base_commit_from_a_damaged_journal_is_not_parsed_as_a_git_option(staged):
    with pytest.raises(AttemptError, match="Not a valid object name --name-only"):
        staged.patch("--name-only")


def test_programs_in_the_git_directory_of_the_agent_are_not_run(staged):
    canary, program = trap(staged)
    git = staged.workspace / ".git"
    with (git / "config").open("a") as config:
        config.write(
            f"[core]\n\tfsmonitor = {program}\n\thooksPath = {program.parent}\n\tpager = {program}\n"
            f"\tsshCommand = {program}\n\teditor = {program}\n\tattributesFile = {program}\n"
            f'[diff]\n\texternal = {program}\n[diff "x"]\n\ttextconv = {program}\n\tcommand = {program}\n'
            f'[filter "x"]\n\tclean = {program}\n\tsmudge = {program}\n\tprocess = {program}\n\trequired = true\n'
        )
    (git / "hooks").mkdir()
    for hook in ("post-index-change", "pre-commit", "reference-transaction", "fsmonitor-watchman"):
        shutil.copy(program, git / "hooks" / hook)
    (git / "info" / "attributes").write_text("* filter=x diff=x\n")
    (staged.workspace / ".gitattributes").write_text("* filter=x diff=x -text\n*.md binary\n")
    (staged.workspace / "README.md").write_text("# Edited\n")

    patch = staged.patch(staged.base_commit)

    assert not canary.exists()
    assert b"+# Edited\n" in patch
    # The control: git runs these programs when it is run in the workspace.
    subprocess.run(["git", "status"], cwd=staged.workspace, capture_output=True, check=False)
    assert canary.exists()


@pytest.mark.parametrize("shape", ["gone", "file", "link", "fifo"])
def test_agent_can_replace_its_git_directory(staged, shape):
    git = staged.workspace / ".git"
    shutil.rmtree(git)
    if shape == "file":
        git.write_text("gitdir: /nowhere\n")
    elif shape == "link":
        git.symlink_to("/")
    elif shape == "fifo":
        os.mkfifo(git)
    (staged.workspace / "README.md").write_text("# Edited\n")

    assert b"+# Edited\n" in staged.patch(staged.base_commit)


def test_link_in_place_of_a_directory_is_not_followed(staged):
    outside = staged.root / "outside"
    outside.mkdir()
    (outside / "app.py").write_text("secret = 1\n")
    shutil.rmtree(staged.workspace / "src")
    (staged.workspace / "src").symlink_to(outside)
    (staged.workspace / "README.md").unlink()
    (staged.workspace / "README.md").symlink_to(outside / "app.py")

    patch = staged.patch(staged.base_commit)

    assert b"secret" not in patch
    assert f"+{outside}\n".encode() in patch


def test_directory_named_gitignore_is_searched(harness):
    harness.upstream.commit({".gitignore": b"*.o\n"})
    base = harness.stage()
    (harness.workspace / ".gitignore").unlink()
    (harness.workspace / ".gitignore/sub/deep").mkdir(parents=True)
    (harness.workspace / ".gitignore/sub/deep/f").write_text("visible\n")
    (harness.workspace / ".gitignore/sub/deep/f.o").write_text("ignored\n")

    patch = harness.patch(base)

    assert b"+visible" in patch
    assert b"ignored" not in patch


def test_special_files_are_excluded(staged):
    (staged.workspace / "README.md").unlink()
    os.mkfifo(staged.workspace / "README.md")
    os.mkfifo(staged.workspace / "pipe")
    # The path of a socket must be short.
    with contextlib.chdir(staged.workspace), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    if os.geteuid() == 0:
        os.mknod(staged.workspace / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (staged.workspace / "new").write_text("1\n")

    patch = staged.patch(staged.base_commit)

    assert not patch.startswith(b"#")
    clone = staged.apply(staged.base_commit, patch)
    changed = run_git("diff", "--cached", "--name-status", directory=clone).splitlines()
    assert changed == ["D\tREADME.md", "A\tnew"]


def test_pipe_in_an_unchanged_tree_is_not_a_change(staged):
    """If the pipe counted as a change, the user could not see that the agent changed nothing."""
    os.mkfifo(staged.workspace / "pipe")

    assert staged.patch(staged.base_commit) == b""


def test_nested_repository_is_included_without_its_git_directory(staged):
    nested = staged.workspace / "vendor" / "lib"
    nested.mkdir(parents=True)
    run_git("init", "--quiet", ".", directory=nested)
    (nested / "code.py").write_text("1\n")
    run_git("add", ".", directory=nested)
    run_git("commit", "--quiet", "--message", "Nested", directory=nested)
    (staged.workspace / "sly").mkdir()
    (staged.workspace / "sly" / ".GIT").write_text("gitdir: /nowhere\n")

    patch = staged.patch(staged.base_commit)

    assert patch.splitlines()[:2] == [
        b"# skipped, git does not support this path: sly/.GIT",
        b"# skipped, git does not support this path: vendor/lib/.git",
    ]
    clone = staged.apply(staged.base_commit, patch)
    assert run_git("diff", "--cached", "--name-only", directory=clone).splitlines() == ["vendor/lib/code.py"]


def test_paths_refused_by_git_are_excluded(staged):
    (staged.workspace / "git~1").write_text("short name of .git\n")
    (staged.workspace / ".gitmodules").symlink_to("README.md")
    (staged.workspace / ".git ").mkdir()
    (staged.workspace / "out").mkdir()
    (staged.workspace / "out" / "b\\.git").write_text("behind a backslash\n")
    (staged.workspace / "~1234567").symlink_to("README.md")
    (staged.workspace / "gi7e~123").symlink_to("README.md")
    (staged.workspace / ".gitmodules:").mkdir()
    (staged.workspace / ".gitmodules:" / "link").symlink_to("README.md")
    (staged.workspace / "kept").write_text("1\n")
    (staged.workspace / "kept\\too").symlink_to("~12345")

    clone = staged.apply(staged.base_commit, staged.patch(staged.base_commit))

    changed = run_git("-c", "core.quotePath=false", "diff", "--cached", "--name-only", "-z", directory=clone)
    assert changed.rstrip("\0").split("\0") == ["kept", "kept\\too"]


def test_deeply_nested_directories_are_excluded(staged):
    directory = os.open(staged.workspace, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=directory)
        inner = os.open("deep", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    (staged.workspace / "kept").write_text("1\n")

    patch = staged.patch(staged.base_commit)

    subprocess.run(["rm", "-rf", str(staged.workspace)], check=True)  # pytest cannot remove directories of this depth
    assert patch.startswith(b"# skipped, the path is too long or too deep: deep/deep/")
    clone = staged.apply(staged.base_commit, patch)
    assert run_git("diff", "--cached", "--name-only", directory=clone).splitlines() == ["kept"]


def test_patch_is_truncated_above_the_file_limit(staged, monkeypatch):
    monkeypatch.setattr(rooted_files, "ENTRIES_MAX", 20)
    for number in range(20):
        (staged.workspace / f"file{number}").touch()

    patch, reason = staged.patch_and_reason(staged.base_commit)
    assert "files that are not ignored" in reason
    assert patch == f"# truncated: {reason}\n".encode()

    for number in range(10):
        (staged.workspace / f"file{number}").unlink()
    staged.verify_patch(staged.base_commit)


def test_files_with_restrictive_modes_are_read(staged):
    """The patch is created without root's capability to override file modes."""
    locked = staged.workspace / "locked"
    locked.mkdir()
    (locked / "inner").write_text("inner\n")
    (staged.workspace / "README.md").write_text("# Locked\n")
    (staged.workspace / "src" / "app.py").chmod(0o100)
    (staged.workspace / "README.md").chmod(0)
    locked.chmod(0)
    staged.workspace.chmod(0)
    program = (
        "import asyncio, json, sys; from pathlib import Path\n"
        "from sandbox.workspace.no_confinement import no_confinement\n"
        "from sandbox.workspace.workspaces import GitWorkspaces\n"
        "patch = GitWorkspaces(json.loads(sys.argv[1])).write_patch\n"
        "asyncio.run(patch(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), no_confinement, lambda _: False))\n"
    )
    sandbox_filesystem.restore_ownership(str(staged.attempt_dir / "repository.git"))
    target = staged.root / "locked.patch"
    arguments = [json.dumps(staged.environment), str(staged.attempt_dir), staged.base_commit, str(target)]
    setpriv_command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

    subprocess.run([*setpriv_command, sys.executable, "-c", program, *arguments], check=True, timeout=60)

    patch = target.read_bytes()
    assert b"+# Locked\n" in patch
    assert b"+inner\n" in patch
    assert b"new mode 100755" in patch


async def test_cancellation_leaves_no_process_and_no_partial_patch(staged):
    with (staged.workspace / "big").open("wb") as file:
        for _ in range(100):
            file.write(os.urandom(1024 * 1024))
    target = staged.root / "task.patch"

    async def cancel():
        making = asyncio.create_task(
            staged.workspaces.write_patch(
                staged.attempt_dir, staged.base_commit, target, staged.confine, lambda _: False
            )
        )
        async with asyncio.timeout(60):
            while b"bwrap" not in descendant_names(os.getpid()):
                await asyncio.sleep(0.01)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(making, 30)

    await cancel()

    assert not target.exists()
    assert b"bwrap" not in descendant_names(os.getpid())


def test_missing_repository_is_reported(staged):
    shutil.rmtree(staged.attempt_dir / "repository.git")

    with pytest.raises(AttemptError, match="The patch could not be created") as raised:
        staged.patch(staged.base_commit)

    assert raised.value.code == "collect_failed"
