"""The patch contains the agent's changes. Applying it to the base commit gives the tree that the agent left."""

import asyncio
import base64
import errno
import os
import shutil
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles.workspace_harness import run_git, snapshot
from sandbox.interfaces.workspace import PatchResult
from sandbox.model.artifacts import DiffStatistics
from sandbox.model.failure import AttemptError
from sandbox.model.resources import transient_disk_error
from sandbox.secrets.redaction.redactor import SecretRedactor
from sandbox.workspace.diff import patch
from sandbox.workspace.diff import patch as changed_files_module
from sandbox.workspace.git_command import Git, GitError

BINARY = bytes(range(256)) * 8
_PATCH_COMMANDS = ("ls-tree", "cat-file", "check-ignore", "fast-import", "diff-tree")


def test_unchanged_workspace_gives_an_empty_patch(harness):
    base = harness.stage()

    assert harness.patch(base) == b""


AGENT_CHANGES = {
    "nothing": lambda workspace: None,
    "commit in the workspace's repository": lambda workspace: (workspace / ".git" / "HEAD").write_text("ref: x\n"),
    "touched file": lambda workspace: os.utime(workspace / "README.md", (1, 1)),
    "empty directory": lambda workspace: (workspace / "empty").mkdir(),
    "same size": lambda workspace: (workspace / "README.md").write_bytes(
        b"X" * (workspace / "README.md").stat().st_size
    ),
    "new file": lambda workspace: (workspace / "new").write_text("new\n"),
    "deleted file": lambda workspace: (workspace / "README.md").unlink(),
    "mode": lambda workspace: (workspace / "README.md").chmod(0o755),
    "link": lambda workspace: (workspace / "link").symlink_to("README.md"),
    "forbidden path": lambda workspace: (workspace / "GIT~1").write_text("skipped"),
}
WITHOUT_CHANGES = ("nothing", "commit in the workspace's repository", "touched file", "empty directory")


@pytest.mark.parametrize("change", AGENT_CHANGES)
def test_runner_that_staged_the_base_makes_the_same_patch_without_git_if_unchanged(harness, monkeypatch, change):
    with monkeypatch.context() as same_runner:
        same_runner.setattr(type(harness), "workspaces", harness.workspaces)
        base, confine, confinements = harness.stage(), harness.confine, []
        AGENT_CHANGES[change](harness.workspace)
        harness.confine = lambda *directories: confinements.append(directories) or confine(*directories)
        patch_text, result = harness.patch_and_result(base, lambda _: False)
    assert bool(confinements) is (change not in WITHOUT_CHANGES)
    assert harness.patch_and_result(base, lambda _: False) == (patch_text, result)
    assert bool(patch_text) is (change not in WITHOUT_CHANGES)


def test_runner_that_staged_the_base_applies_the_ignore_rules(harness, monkeypatch):
    monkeypatch.setattr(type(harness), "workspaces", harness.workspaces)
    harness.upstream.commit({".gitignore": b"*.o\n"})
    base = harness.stage()
    (harness.workspace / "main.o").write_text("ignored")
    assert harness.patch(base) == b""
    (harness.workspace / "main.c").write_text("new\n")
    assert b"main.c" in harness.patch(base)


def test_unneeded_git_commands_are_not_run(harness, monkeypatch):
    commands, run = [], Git.run

    async def record_command(git, *arguments, **options):
        commands.append(next(argument for argument in arguments if argument in _PATCH_COMMANDS))
        return await run(git, *arguments, **options)

    base = harness.stage()
    monkeypatch.setattr(Git, "run", record_command)
    assert harness.patch(base) == b""
    (harness.workspace / "new").touch()
    assert b"new file mode" in harness.patch(base)
    assert commands == ["ls-tree", "ls-tree", "fast-import", "diff-tree", "diff-tree"]


def test_patch_contains_every_kind_of_change(harness):
    upstream = harness.upstream
    upstream.commit(
        {"gone": b"1\n", "picture": BINARY, "run.sh": b"#!/bin/sh\n", "crlf": b"a\r\nb\r\n", "x/y/z": b"z\n"}
    )
    (upstream.work / "link").symlink_to("README.md")
    upstream.commit_all()
    base = harness.stage()
    root = harness.workspace

    (root / "README.md").write_text("# Edited\n")
    (root / "gone").unlink()
    (root / "new").mkdir()
    (root / "new" / "file without newline").write_bytes(b"no newline")
    (root / "empty").touch()
    (root / "picture").write_bytes(BINARY[::-1])
    (root / "another picture").write_bytes(BINARY + b"!")
    (root / "run.sh").chmod(0o755)
    (root / "crlf").write_bytes(b"a\r\nc\r\n")
    (root / "src" / "lib.py").rename(root / "src" / "renamed.py")
    (root / "link").unlink()
    (root / "link").symlink_to("src")
    (root / "dangling").symlink_to("/nowhere/at/all")
    shutil.rmtree(root / "x")

    task_patch = harness.verify_patch(base)

    assert b"rename from src/lib.py\nrename to src/renamed.py\n" in task_patch
    assert b"GIT binary patch" in task_patch
    assert b"old mode 100644\nnew mode 100755\n" in task_patch


def patch_result(harness, base):
    _, result = harness.patch_and_result(base, lambda _: False)
    return result


def test_size_of_the_patch_counts_files_and_lines(harness):
    harness.upstream.commit({"gone": b"1\n2\n", "picture": BINARY, "moved": b"a\nb\nc\nd\ne\nf\n"})
    base = harness.stage()
    assert patch_result(harness, base) == PatchResult(diff=DiffStatistics(0, 0, 0))
    root = harness.workspace

    (root / "gone").unlink()
    (root / "new").write_text("x\ny\nz\n")
    (root / "picture").write_bytes(BINARY[::-1])
    (root / "moved").rename(root / "renamed")

    assert patch_result(harness, base) == PatchResult(diff=DiffStatistics(4, 3, 2))


@pytest.mark.parametrize("error", [GitError(1, b"no"), TimeoutError()])
def test_patch_is_complete_even_if_its_size_cannot_be_measured(harness, monkeypatch, error):
    run = Git.run

    async def fail_to_measure(git, *arguments, **options):
        if "--shortstat" in arguments:
            raise error
        return await run(git, *arguments, **options)

    base = harness.stage()
    (harness.workspace / "new").touch()
    monkeypatch.setattr(Git, "run", fail_to_measure)

    assert patch_result(harness, base) == PatchResult()
    harness.verify_patch(base)


@pytest.mark.parametrize("has_directory", [True, False])
def test_patch_of_a_renamed_link_applies_even_if_a_directory_replaces_the_link(harness, has_directory):
    (harness.upstream.work / "current").symlink_to("releases/1")
    harness.upstream.commit_all()
    base = harness.stage()
    (harness.workspace / "current").rename(harness.workspace / "previous")
    if has_directory:
        (harness.workspace / "current").mkdir()
        (harness.workspace / "current" / "app").write_text("app\n")

    patch = harness.verify_patch(base)

    assert (b"rename from current\n" in patch) is not has_directory


def test_files_and_directories_and_links_can_replace_each_other(harness):
    harness.upstream.commit({"file": b"f\n", "directory/one": b"1\n", "directory/two": b"2\n", "to-link": b"l\n"})
    base = harness.stage()
    root = harness.workspace

    (root / "file").unlink()
    (root / "file" / "deep").mkdir(parents=True)
    (root / "file" / "deep" / "inside").write_text("f\n")
    shutil.rmtree(root / "directory")
    (root / "directory").write_text("now a file\n")
    (root / "to-link").unlink()
    (root / "to-link").symlink_to("file")

    harness.verify_patch(base)


ODD_NAMES = [
    "ünï/cödé",
    'quo"te',
    "tab\there",
    "line\nbreak",
    "back\\slash",
    " space ",
    "-dash",
    ":(top)magic",
    "*?[x]",
    "\udcff",
]


def test_files_with_unusual_names_are_in_the_patch(harness):
    base = harness.stage()
    for name in ODD_NAMES:
        path = harness.workspace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("odd\n")

    assert harness.verify_patch(base).count(b"new file mode") == len(ODD_NAMES)


def test_non_ascii_names_are_not_escaped(harness):
    base = harness.stage()
    (harness.workspace / "h\u00e4\u00df.txt").write_text("odd\n")
    assert "+++ b/h\u00e4\u00df.txt\n".encode() in harness.verify_patch(base)


def test_changes_to_repository_files_with_unusual_names_are_in_the_patch(harness):
    base = harness.upstream.commit({"line\nbreak/tab\t": b"1\n", 'quo"te': b"2\n", "\udcff": b"3\n"})
    harness.stage()
    (harness.workspace / "line\nbreak" / "tab\t").unlink()
    (harness.workspace / 'quo"te').write_text("other\n")
    (harness.workspace / "\udcff").rename(harness.workspace / "\udcfe")

    harness.verify_patch(base)


def test_commits_by_the_agent_are_in_the_patch(harness):
    base = harness.stage()
    (harness.workspace / "new").write_text("1\n")
    run_git("add", ".", directory=harness.workspace)
    run_git("commit", "--quiet", "--message", "Mine", directory=harness.workspace)

    assert b"new file mode" in harness.verify_patch(base)


def test_files_ignored_by_the_base_commit_are_excluded(harness):
    base = harness.upstream.commit(
        {
            ".gitignore": b"node_modules/\n*.log\n!keep.log\n/only-here\nfoo/*\n!foo/kept\n",
            "src/.gitignore": b"*.tmp\n",
            "tracked.log": b"tracked though ignored\n",
            "src/app.py": b"print(1)\n",
        }
    )
    harness.stage()
    root = harness.workspace
    for ignored in ("node_modules/a/b.js", "x.log", "deep/y.log", "only-here", "src/z.tmp", "foo/bar"):
        (root / ignored).parent.mkdir(parents=True, exist_ok=True)
        (root / ignored).write_text("ignored\n")
    for included in ("deep/only-here", "keep.log", "z.tmp", "foo/kept", "deep/node_modules.txt"):
        (root / included).write_text("included\n")
    (root / "tracked.log").write_text("edited\n")

    clone = harness.apply(base, harness.patch(base))

    changed = run_git("diff", "--cached", "--name-only", directory=clone).splitlines()
    assert changed == ["deep/node_modules.txt", "deep/only-here", "foo/kept", "keep.log", "tracked.log", "z.tmp"]


def test_only_directories_with_ignore_rules_are_recreated(harness):
    harness.upstream.commit({".gitignore": b"ignored/\n", "src/.gitignore": b"*.tmp/\n"})
    base = harness.stage()
    for number in range(50):
        (harness.workspace / f"new/{number}/inner").mkdir(parents=True)
    for ignored in ("new/ignored", "src/a.tmp", "src/deep/b.tmp"):
        (harness.workspace / ignored).mkdir(parents=True)
        (harness.workspace / ignored / "file").touch()
    (harness.workspace / "new" / "file").write_text("new\n")

    clone = harness.apply(base, harness.patch(base))

    assert run_git("diff", "--cached", "--name-only", directory=clone).splitlines() == ["new/file"]
    remaining = sorted(
        str(path.relative_to(harness.attempt_dir)) for path in harness.attempt_dir.glob("ignore-rules/**/*")
    )
    assert remaining == ["ignore-rules/.gitignore", "ignore-rules/src", "ignore-rules/src/.gitignore"]


def test_names_with_pathspec_magic_are_matched_literally(harness):
    base = harness.upstream.commit({".gitignore": b"/hidden\n"})
    harness.stage()
    (harness.workspace / ":(top)hidden").write_text("not ignored\n")
    (harness.workspace / "hidden").write_text("ignored\n")

    clone = harness.apply(base, harness.patch(base))

    assert run_git("diff", "--cached", "--name-only", base, directory=clone) == ":(top)hidden"


@pytest.mark.parametrize("place", ["logs", "deep/logs"])
@pytest.mark.parametrize("replacement", ["file", "link"])
def test_file_or_link_replacing_an_ignored_directory_is_included(harness, place, replacement):
    parent = place.partition("logs")[0]
    base = harness.upstream.commit({f"{parent}.gitignore": b"logs/\n", f"{place}/.gitignore": b"*\n!.gitignore\n"})
    harness.stage()
    shutil.rmtree(harness.workspace / place)
    if replacement == "file":
        (harness.workspace / place).write_text("work\n")
    else:
        (harness.workspace / place).symlink_to("/dev/null")
    (harness.workspace / parent / "new").mkdir()
    (harness.workspace / parent / "new" / "logs").mkdir()
    (harness.workspace / parent / "new" / "logs" / "file").write_text("ignored\n")

    task_patch = harness.patch(base)

    clone = harness.apply(base, task_patch)
    changed = run_git("diff", "--cached", "--name-status", directory=clone).splitlines()
    assert changed == [f"A\t{place}", f"D\t{place}/.gitignore"]
    remaining = sorted(
        str(path.relative_to(harness.attempt_dir)) for path in harness.attempt_dir.glob("ignore-rules/**/.gitignore")
    )
    assert remaining == [f"ignore-rules/{parent}.gitignore", f"ignore-rules/{place}/.gitignore"]


def test_gitignore_file_can_become_a_directory(harness):
    base = harness.upstream.commit({".gitignore": b"*.log\n", "src/.gitignore": b"*.tmp\n"})
    harness.stage()
    for place in (harness.workspace, harness.workspace / "src"):
        (place / ".gitignore").unlink()
        (place / ".gitignore").mkdir()
        (place / ".gitignore" / "file").write_text("new\n")

    harness.verify_patch(base)


def test_many_new_files_with_long_names_are_in_the_patch(harness):
    base = harness.upstream.commit({".gitignore": b"*.log\n"})
    harness.stage()
    for number in range(800):
        (harness.workspace / f"{number:0200}").touch()

    assert harness.patch(base).count(b"new file mode") == 800


def test_agent_cannot_hide_files_with_new_ignore_rules(harness):
    base = harness.upstream.commit({".gitignore": b"*.log\n"})
    harness.stage()
    (harness.workspace / ".gitignore").write_text("*\n")
    (harness.workspace / ".git" / "info" / "exclude").write_text("*\n")
    (harness.workspace / "sub").mkdir()
    (harness.workspace / "sub" / ".gitignore").write_text("*\n")
    (harness.workspace / "sub" / "file").write_text("seen\n")
    (harness.workspace / "x.log").write_text("ignored by the base commit\n")

    clone = harness.apply(base, harness.patch(base))

    changed = run_git("diff", "--cached", "--name-only", directory=clone).splitlines()
    assert changed == [".gitignore", "sub/.gitignore", "sub/file"]


def test_excludes_and_attributes_of_the_server_user_are_ignored(harness):
    home = harness.root / "home" / ".config" / "git"
    home.mkdir(parents=True)
    (home / "ignore").write_text("*\n")
    (home / "attributes").write_text("* -diff\n")
    harness.configure(f"[core]\n\texcludesFile = {home / 'ignore'}\n\tattributesFile = {home / 'attributes'}")
    base = harness.stage()
    (harness.workspace / "new").write_text("1\n")

    assert b"+1\n" in harness.verify_patch(base)


def test_ignored_directory_is_not_searched(harness, listed_directories):
    base = harness.upstream.commit({".gitignore": b"node_modules/\n"})
    harness.stage()
    (harness.workspace / "node_modules" / "a").mkdir(parents=True)
    (harness.workspace / "modules").mkdir()

    assert harness.patch(base) == b""

    assert b"modules" in listed_directories
    assert b"node_modules" not in listed_directories


def test_removed_submodule_is_in_the_patch(harness):
    work = harness.upstream.work
    run_git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},lib", directory=work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=work)
    base = harness.upstream.push()
    harness.stage()
    (harness.workspace / "lib").rmdir()

    clone = harness.apply(base, harness.patch(base))

    assert run_git("ls-files", "lib", directory=clone) == ""


def test_changes_in_a_submodule_are_excluded(harness):
    work = harness.upstream.work
    run_git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},lib", directory=work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=work)
    base = harness.upstream.push()
    harness.stage()
    (harness.workspace / "lib" / "file").write_text("not visible\n")

    assert harness.patch(base) == b""


def test_patch_can_be_recreated(harness):
    base = harness.stage()
    (harness.workspace / "new").write_text("1\n")
    first = harness.patch(base)
    (harness.workspace / "new").write_text("2\n")

    assert harness.patch(base) != first
    harness.verify_patch(base)


def test_file_above_the_size_limit_is_excluded_and_named_in_a_comment(harness, monkeypatch):
    monkeypatch.setattr(patch, "PATCH_BYTES_MAX", 2000)
    base = harness.stage()
    (harness.workspace / "huge").touch()
    os.truncate(harness.workspace / "huge", 2**40)
    (harness.workspace / "small").write_bytes(b"x\n" * 400)

    task_patch, reason = harness.patch_and_reason(base)

    assert "1 changed files (the first is huge" in reason
    assert task_patch.startswith(b"# skipped, too large for a patch: huge\n")
    assert b"b/small" in task_patch
    assert b"b/huge" not in task_patch
    (harness.workspace / "huge").unlink()
    harness.verify_patch(base)


def test_patch_above_the_size_limit_is_replaced_by_a_message(harness, monkeypatch):
    monkeypatch.setattr(patch, "PATCH_BYTES_MAX", 2000)
    base = harness.upstream.commit({"big": os.urandom(20_000)})
    harness.stage()
    (harness.workspace / "big").unlink()

    task_patch, reason = harness.patch_and_reason(base)

    assert "exceeds the maximum patch size" in reason
    assert task_patch == f"# truncated: {reason}\n".encode()


def changed_files(harness, base):
    target = harness.root / "changes.tar"
    reason = asyncio.run(
        harness.workspaces.write_changed_files_archive(harness.attempt_dir, base, target, harness.confine)
    )
    with tarfile.open(target, errors="surrogateescape") as tar:
        members = {member.name: member for member in tar}
        contents = {name: tar.extractfile(name).read() for name, member in members.items() if member.isreg()}
    return members, contents, reason


def test_changed_files_are_archived_byte_for_byte(harness):
    long_name = "/".join(["deep" * 20] * 5)
    base = harness.upstream.commit({"same": b"same\n", "edited": b"1\n", "gone": b"1\n", ".gitignore": b"*.log\n"})
    harness.stage()
    root = harness.workspace
    (root / "edited").write_bytes(b"2\n")
    (root / "gone").unlink()
    (root / "new.bin").write_bytes(BINARY)
    (root / "new.bin").chmod(0o755)
    (root / "build.log").write_bytes(b"ignored")
    (root / "link").symlink_to("/etc/passwd")
    (root / long_name).mkdir(parents=True)
    (root / long_name / "file").write_bytes(b"deep")
    os.mkfifo(root / "fifo")
    with open(os.fsencode(root) + b"/\xff", "wb") as file:  # noqa: PTH123
        file.write(b"no text")

    members, contents, reason = changed_files(harness, base)

    assert reason is None
    assert contents == {
        "edited": b"2\n", "new.bin": BINARY, f"{long_name}/file": b"deep", "\udcff": b"no text",
    }  # fmt: skip
    assert members["new.bin"].mode == 0o755
    assert (members["link"].type, members["link"].linkname) == (tarfile.SYMTYPE, "/etc/passwd")
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 0)}


def test_changed_files_above_the_size_limit_are_counted(harness, monkeypatch):
    monkeypatch.setattr(changed_files_module, "CHANGED_FILES_TAR_BYTES_MAX", 10_000)
    base = harness.stage()
    (harness.workspace / "huge").touch()
    os.truncate(harness.workspace / "huge", 2**40)
    (harness.workspace / "small").write_bytes(b"fits")

    _, contents, reason = changed_files(harness, base)

    assert contents == {"small": b"fits"}
    assert "1 files would make it larger" in reason
    assert (harness.root / "changes.tar").stat().st_size <= 10_000


def test_archive_is_removed_when_the_disk_is_full(harness, monkeypatch):
    base = harness.stage()
    (harness.workspace / "new").write_bytes(BINARY)

    def refuse(_):
        assert (harness.root / "changes.tar").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changed_files_module, "fsync_path", refuse)
    with pytest.raises(AttemptError) as failed:
        changed_files(harness, base)

    assert transient_disk_error(failed.value) is not None
    assert not (harness.root / "changes.tar").exists()


NAMES = st.sampled_from(["a", "b", "a/b", "a/b/c", "d/e", "d/e/f", "ü", 'q"x', "z z", "n\nl"])
CONTENTS = st.sampled_from([b"", b"x", b"line\n" * 30, b"line\n" * 29 + b"other\n", b"a\r\nb\n", b"\0\1\2" * 50])
CHANGES = st.one_of(
    st.tuples(st.just("write"), NAMES, CONTENTS),
    st.tuples(st.just("link"), NAMES, st.sampled_from([b"a", b"d/e", b"/etc/passwd"])),
    st.tuples(st.just("delete"), NAMES, st.none()),
    st.tuples(st.just("chmod"), NAMES, st.none()),
    st.tuples(st.just("move"), NAMES, NAMES),
)


def test_patch_of_arbitrary_changes_applies(harness):
    base = harness.upstream.commit(
        {"a/b/c": b"line\n" * 30, "b": b"x", "d/e": b"a\r\nb\n", "ü": b"", 'q"x': b"\0\1\2" * 50, "z z": b"zz\n"}
    )
    harness.stage()
    pristine = harness.root / "pristine"
    shutil.copytree(harness.workspace, pristine, symlinks=True)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(CHANGES, max_size=12))
    def check(changes):
        shutil.rmtree(harness.workspace)
        shutil.copytree(pristine, harness.workspace, symlinks=True)
        for change in changes:
            apply_change(harness.workspace, *change)
        task_patch = harness.verify_patch(base)
        assert (task_patch == b"") == (snapshot(harness.workspace) == snapshot(pristine))

    check()


def apply_change(root, kind, name, detail):
    path = root / name
    if kind in ("write", "link"):
        clear_path(root, path)
        if kind == "link":
            path.symlink_to(os.fsdecode(detail))
        else:
            path.write_bytes(detail)
    elif kind == "delete":
        remove(path)
    elif kind == "chmod" and path.is_file() and not path.is_symlink():
        path.chmod(path.stat().st_mode ^ 0o111)
    elif kind == "move" and os.path.lexists(path) and not (root / detail).is_relative_to(path):
        temporary = root / ".moving"
        path.rename(temporary)
        clear_path(root, root / detail)
        temporary.rename(root / detail)


def clear_path(root, path):
    for parent in reversed(path.relative_to(root).parents):
        if (root / parent).is_symlink() or (root / parent).is_file():
            remove(root / parent)
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def test_lock_files_of_a_killed_git_do_not_block_the_patch(harness):
    base = harness.stage()
    (harness.workspace / "new").write_text("new\n")
    task_patch = harness.patch(base)
    # fast-import leaves a .keep file until it has written its reference, and a lock file during that write.
    for pack in (harness.attempt_dir / "repository.git" / "objects" / "pack").glob("*.pack"):
        pack.with_suffix(".keep").write_text("fast-import\n")
    (harness.attempt_dir / "repository.git" / "refs" / "sandbox" / "new.lock").touch()

    assert harness.patch(base) == task_patch


TOKEN = b"tok_5f9c1e77aa0b4d2c"


@pytest.mark.parametrize(
    ("content", "is_flagged"),
    [
        (b"\0" * 300_000 + b"key=" + TOKEN, True),
        (b"\0" * 300_000 + TOKEN + b"\0" * 300_000, True),
        (b"\0" * 300_000 + b"key=" + TOKEN[:-1], False),
        (base64.encodebytes(b"the key, not for publication, is " + TOKEN + b" and may be used by all"), True),
        (b"key=" + TOKEN, True),
    ],
    ids=["at the end of a binary", "in the middle of a binary", "a different value", "wrapped in base64", "plain"],
)
def test_secret_in_a_file_is_detected_in_any_encoding_of_the_patch(harness, content, is_flagged):
    base = harness.stage()
    (harness.workspace / "state.db").write_bytes(content)
    task_patch, result = harness.patch_and_result(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert (result.contains_secret, result.incomplete_reason) == (is_flagged, None)
    clone = harness.apply(base, task_patch)
    assert (clone / "state.db").read_bytes() == content


def test_secret_in_a_link_is_detected(harness):
    base = harness.stage()
    (harness.workspace / "link").symlink_to(TOKEN)
    _, result = harness.patch_and_result(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert result.contains_secret


def test_secret_stops_the_scan_but_the_patch_is_complete(harness):
    base = harness.stage()
    for name in ("a", "b", "c"):
        (harness.workspace / name).write_text(f"{name}\n")
    scanned = []

    def detect_second(chunks):
        scanned.append(b"".join(chunks))
        return scanned[-1] == b"b\n"

    task_patch, result = harness.patch_and_result(base, detect_second)
    assert (result.contains_secret, scanned) == (True, [b"a\n", b"b\n"])
    clone = harness.apply(base, task_patch)
    assert [(clone / name).read_text() for name in ("a", "b", "c")] == ["a\n", "b\n", "c\n"]


def test_secret_in_the_base_commit_is_not_flagged(harness):
    harness.upstream.commit({"old": TOKEN})
    base = harness.stage()
    (harness.workspace / "new").write_bytes(b"without a value\n")
    _, result = harness.patch_and_result(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert not result.contains_secret
