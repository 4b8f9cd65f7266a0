"""The patch is what the agent changed: it applies to the base commit and gives the same tree."""

import asyncio
import base64
import errno
import os
import shutil
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles.workspace_fixture import run_git, snapshot
from sandbox.interfaces.workspace import PatchResult
from sandbox.model.disk_space import transient_disk_error
from sandbox.model.errors import AttemptError
from sandbox.secrets.redactor import SecretRedactor
from sandbox.workspace.diff import changed_files_archive as changed_files_module
from sandbox.workspace.diff import patch, trees
from sandbox.workspace.git.command import Git

BINARY = bytes(range(256)) * 8
_ASKED_FOR_A_PATCH = ("ls-tree", "cat-file", "check-ignore", "fast-import", "diff-tree")


def test_nothing_changed_gives_an_empty_file(house):
    base = house.stage()

    assert house.patch(base) == b""


def test_git_is_asked_only_what_there_is_to_ask(house, monkeypatch):
    asked, run = [], Git.run

    async def noted(git, *arguments, **options):
        asked.append(next(one for one in arguments if one in _ASKED_FOR_A_PATCH))
        return await run(git, *arguments, **options)

    base = house.stage()
    monkeypatch.setattr(Git, "run", noted)
    assert house.patch(base) == b""
    (house.workspace / "new").touch()
    assert b"new file mode" in house.patch(base)
    assert asked == ["ls-tree", "ls-tree", "fast-import", "diff-tree"]


def test_every_kind_of_change(house):
    upstream = house.upstream
    upstream.commit(
        {"gone": b"1\n", "picture": BINARY, "run.sh": b"#!/bin/sh\n", "crlf": b"a\r\nb\r\n", "x/y/z": b"z\n"}
    )
    (upstream.work / "link").symlink_to("README.md")
    upstream.commit_all()
    base = house.stage()
    root = house.workspace

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

    made = house.patch_applies_whole(base)

    assert b"rename from src/lib.py\nrename to src/renamed.py\n" in made
    assert b"GIT binary patch" in made
    assert b"old mode 100644\nnew mode 100755\n" in made


def test_files_and_directories_and_links_change_places(house):
    house.upstream.commit({"file": b"f\n", "directory/one": b"1\n", "directory/two": b"2\n", "to-link": b"l\n"})
    base = house.stage()
    root = house.workspace

    (root / "file").unlink()
    (root / "file" / "deep").mkdir(parents=True)
    (root / "file" / "deep" / "inside").write_text("f\n")
    shutil.rmtree(root / "directory")
    (root / "directory").write_text("now a file\n")
    (root / "to-link").unlink()
    (root / "to-link").symlink_to("file")

    house.patch_applies_whole(base)


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


def test_odd_names(house):
    base = house.stage()
    for name in ODD_NAMES:
        path = house.workspace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("odd\n")

    assert house.patch_applies_whole(base).count(b"new file mode") == len(ODD_NAMES)


def test_odd_names_in_the_repository(house):
    base = house.upstream.commit({"line\nbreak/tab\t": b"1\n", 'quo"te': b"2\n", "\udcff": b"3\n"})
    house.stage()
    (house.workspace / "line\nbreak" / "tab\t").unlink()
    (house.workspace / 'quo"te').write_text("other\n")
    (house.workspace / "\udcff").rename(house.workspace / "\udcfe")

    house.patch_applies_whole(base)


def test_what_the_agent_committed_counts_as_well(house):
    base = house.stage()
    (house.workspace / "new").write_text("1\n")
    run_git("add", ".", directory=house.workspace)
    run_git("commit", "--quiet", "--message", "Mine", directory=house.workspace)

    assert b"new file mode" in house.patch_applies_whole(base)


def test_ignored_files_are_left_out_by_the_rules_of_the_base_commit(house):
    base = house.upstream.commit(
        {
            ".gitignore": b"node_modules/\n*.log\n!keep.log\n/only-here\nfoo/*\n!foo/kept\n",
            "src/.gitignore": b"*.tmp\n",
            "tracked.log": b"tracked though ignored\n",
            "src/app.py": b"print(1)\n",
        }
    )
    house.stage()
    root = house.workspace
    for ignored in ("node_modules/a/b.js", "x.log", "deep/y.log", "only-here", "src/z.tmp", "foo/bar"):
        (root / ignored).parent.mkdir(parents=True, exist_ok=True)
        (root / ignored).write_text("ignored\n")
    for wanted in ("deep/only-here", "keep.log", "z.tmp", "foo/kept", "deep/node_modules.txt"):
        (root / wanted).write_text("wanted\n")
    (root / "tracked.log").write_text("edited\n")

    clone = house.apply(base, house.patch(base))

    changed = run_git("diff", "--cached", "--name-only", directory=clone).splitlines()
    assert changed == ["deep/node_modules.txt", "deep/only-here", "foo/kept", "keep.log", "tracked.log", "z.tmp"]


def test_the_agents_directories_are_not_made_a_second_time(house):
    house.upstream.commit({".gitignore": b"ignored/\n", "src/.gitignore": b"*.tmp/\n"})
    base = house.stage()
    for number in range(50):
        (house.workspace / f"new/{number}/inner").mkdir(parents=True)
    for ignored in ("new/ignored", "src/a.tmp", "src/deep/b.tmp"):
        (house.workspace / ignored).mkdir(parents=True)
        (house.workspace / ignored / "file").touch()
    (house.workspace / "new" / "file").write_text("new\n")

    clone = house.apply(base, house.patch(base))

    assert run_git("diff", "--cached", "--name-only", directory=clone).splitlines() == ["new/file"]
    left = sorted(str(path.relative_to(house.attempt)) for path in house.attempt.glob("ignore-rules/**/*"))
    assert left == ["ignore-rules/.gitignore", "ignore-rules/src", "ignore-rules/src/.gitignore"]


def test_names_that_look_like_a_pattern_of_git_are_asked_about_as_they_are(house):
    base = house.upstream.commit({".gitignore": b"/hidden\n"})
    house.stage()
    (house.workspace / ":(top)hidden").write_text("not ignored\n")
    (house.workspace / "hidden").write_text("ignored\n")

    clone = house.apply(base, house.patch(base))

    assert run_git("diff", "--cached", "--name-only", base, directory=clone) == ":(top)hidden"


@pytest.mark.parametrize("place", ["logs", "deep/logs"])
@pytest.mark.parametrize("by", ["file", "link"])
def test_what_replaces_an_ignored_directory_of_the_base_commit_is_no_directory(house, place, by):
    parent = place.partition("logs")[0]
    base = house.upstream.commit({f"{parent}.gitignore": b"logs/\n", f"{place}/.gitignore": b"*\n!.gitignore\n"})
    house.stage()
    shutil.rmtree(house.workspace / place)
    if by == "file":
        (house.workspace / place).write_text("work\n")
    else:
        (house.workspace / place).symlink_to("/dev/null")
    (house.workspace / parent / "new").mkdir()
    (house.workspace / parent / "new" / "logs").mkdir()
    (house.workspace / parent / "new" / "logs" / "file").write_text("ignored\n")

    made = house.patch(base)

    clone = house.apply(base, made)
    changed = run_git("diff", "--cached", "--name-status", directory=clone).splitlines()
    assert changed == [f"A\t{place}", f"D\t{place}/.gitignore"]
    left = sorted(str(path.relative_to(house.attempt)) for path in house.attempt.glob("ignore-rules/**/.gitignore"))
    assert left == [f"ignore-rules/{parent}.gitignore", f"ignore-rules/{place}/.gitignore"]


def test_ignore_files_may_become_directories(house):
    base = house.upstream.commit({".gitignore": b"*.log\n", "src/.gitignore": b"*.tmp\n"})
    house.stage()
    for place in (house.workspace, house.workspace / "src"):
        (place / ".gitignore").unlink()
        (place / ".gitignore").mkdir()
        (place / ".gitignore" / "file").write_text("new\n")

    house.patch_applies_whole(base)


def test_a_crowd_of_new_files_with_long_names_holds_nobody_up(house):
    base = house.upstream.commit({".gitignore": b"*.log\n"})
    house.stage()
    for number in range(800):
        (house.workspace / f"{number:0200}").touch()

    assert house.patch(base).count(b"new file mode") == 800


def test_an_agent_cannot_hide_files_with_rules_of_its_own(house):
    base = house.upstream.commit({".gitignore": b"*.log\n"})
    house.stage()
    (house.workspace / ".gitignore").write_text("*\n")
    (house.workspace / ".git" / "info" / "exclude").write_text("*\n")
    (house.workspace / "sub").mkdir()
    (house.workspace / "sub" / ".gitignore").write_text("*\n")
    (house.workspace / "sub" / "file").write_text("seen\n")
    (house.workspace / "x.log").write_text("ignored by the base commit\n")

    clone = house.apply(base, house.patch(base))

    changed = run_git("diff", "--cached", "--name-only", directory=clone).splitlines()
    assert changed == [".gitignore", "sub/.gitignore", "sub/file"]


def test_excludes_and_attributes_of_the_servers_user_do_not_count(house):
    home = house.root / "home" / ".config" / "git"
    home.mkdir(parents=True)
    (home / "ignore").write_text("*\n")
    (home / "attributes").write_text("* -diff\n")
    house.configure(f"[core]\n\texcludesFile = {home / 'ignore'}\n\tattributesFile = {home / 'attributes'}")
    base = house.stage()
    (house.workspace / "new").write_text("1\n")

    assert b"+1\n" in house.patch_applies_whole(base)


def test_an_ignored_directory_is_not_searched(house, searched):
    base = house.upstream.commit({".gitignore": b"node_modules/\n"})
    house.stage()
    (house.workspace / "node_modules" / "a").mkdir(parents=True)
    (house.workspace / "modules").mkdir()

    assert house.patch(base) == b""

    assert b"modules" in searched
    assert b"node_modules" not in searched


def test_a_submodule_that_was_removed_is_removed(house):
    work = house.upstream.work
    run_git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},lib", directory=work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=work)
    base = house.upstream.push()
    house.stage()
    (house.workspace / "lib").rmdir()

    clone = house.apply(base, house.patch(base))

    assert run_git("ls-files", "lib", directory=clone) == ""


def test_a_submodule_with_files_in_it_stays_as_it_is(house):
    work = house.upstream.work
    run_git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},lib", directory=work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=work)
    base = house.upstream.push()
    house.stage()
    (house.workspace / "lib" / "file").write_text("cannot be told\n")

    assert house.patch(base) == b""


def test_the_patch_can_be_made_again(house):
    base = house.stage()
    (house.workspace / "new").write_text("1\n")
    first = house.patch(base)
    (house.workspace / "new").write_text("2\n")

    assert house.patch(base) != first
    house.patch_applies_whole(base)


def test_what_is_over_the_bound_is_left_out_and_named_and_the_rest_applies(house, monkeypatch):
    monkeypatch.setattr(trees, "PATCH_BYTES_MAX", 1000)
    base = house.stage()
    (house.workspace / "huge").touch()
    os.truncate(house.workspace / "huge", 2**40)
    (house.workspace / "small").write_bytes(b"x\n" * 400)

    made, reason = house.patch_and_reason(base)

    assert "1 files of what the agent changed, huge the first" in reason
    assert made.startswith(b"# left out, too large for a patch: huge\n")
    assert b"b/small" in made
    assert b"b/huge" not in made
    (house.workspace / "huge").unlink()
    house.patch_applies_whole(base)


def test_a_patch_over_the_bound_is_no_half_of_one(house, monkeypatch):
    monkeypatch.setattr(patch, "PATCH_BYTES_MAX", 2000)
    base = house.upstream.commit({"big": os.urandom(20_000)})
    house.stage()
    (house.workspace / "big").unlink()

    made, reason = house.patch_and_reason(base)

    assert "larger than a patch may be" in reason
    assert made == f"# truncated: {reason}\n".encode()


def changed_files(house, base):
    target = house.root / "changes.tar"
    reason = asyncio.run(house.workspaces.changed_files(house.attempt, base, target, house.confine))
    with tarfile.open(target, errors="surrogateescape") as tar:
        members = {member.name: member for member in tar}
        contents = {name: tar.extractfile(name).read() for name, member in members.items() if member.isreg()}
    return members, contents, reason


def test_the_changed_files_are_kept_as_they_are(house):
    long_name = "/".join(["deep" * 20] * 5)
    base = house.upstream.commit({"same": b"same\n", "edited": b"1\n", "gone": b"1\n", ".gitignore": b"*.log\n"})
    house.stage()
    root = house.workspace
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

    members, contents, reason = changed_files(house, base)

    assert reason is None
    assert contents == {
        "edited": b"2\n", "new.bin": BINARY, f"{long_name}/file": b"deep", "\udcff": b"no text",
    }  # fmt: skip
    assert members["new.bin"].mode == 0o755
    assert (members["link"].type, members["link"].linkname) == (tarfile.SYMTYPE, "/etc/passwd")
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 0)}


def test_changed_files_past_the_bound_are_counted(house, monkeypatch):
    monkeypatch.setattr(changed_files_module, "ARTIFACT_BYTES_MAX", 20_000)
    base = house.stage()
    (house.workspace / "huge").touch()
    os.truncate(house.workspace / "huge", 2**40)
    (house.workspace / "small").write_bytes(b"fits")

    _, contents, reason = changed_files(house, base)

    assert contents == {"small": b"fits"}
    assert "1 files would have made it larger" in reason
    assert (house.root / "changes.tar").stat().st_size <= 10_000


def test_what_a_full_disk_took_of_the_changed_files_takes_no_room_afterwards(house, monkeypatch):
    base = house.stage()
    (house.workspace / "new").write_bytes(BINARY)

    def refuse(_):
        assert (house.root / "changes.tar").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changed_files_module, "fsync_path", refuse)
    with pytest.raises(AttemptError) as failed:
        changed_files(house, base)

    assert transient_disk_error(failed.value) is not None
    assert not (house.root / "changes.tar").exists()


NAMES = st.sampled_from(["a", "b", "a/b", "a/b/c", "d/e", "d/e/f", "ü", 'q"x', "z z", "n\nl"])
CONTENTS = st.sampled_from([b"", b"x", b"line\n" * 30, b"line\n" * 29 + b"other\n", b"a\r\nb\n", b"\0\1\2" * 50])
CHANGES = st.one_of(
    st.tuples(st.just("write"), NAMES, CONTENTS),
    st.tuples(st.just("link"), NAMES, st.sampled_from([b"a", b"d/e", b"/etc/passwd"])),
    st.tuples(st.just("delete"), NAMES, st.none()),
    st.tuples(st.just("chmod"), NAMES, st.none()),
    st.tuples(st.just("move"), NAMES, NAMES),
)


def test_any_series_of_changes_gives_a_patch_that_applies(house):
    base = house.upstream.commit(
        {"a/b/c": b"line\n" * 30, "b": b"x", "d/e": b"a\r\nb\n", "ü": b"", 'q"x': b"\0\1\2" * 50, "z z": b"zz\n"}
    )
    house.stage()
    pristine = house.root / "pristine"
    shutil.copytree(house.workspace, pristine, symlinks=True)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(CHANGES, max_size=12))
    def check(changes):
        shutil.rmtree(house.workspace)
        shutil.copytree(pristine, house.workspace, symlinks=True)
        for change in changes:
            carry_out(house.workspace, *change)
        made = house.patch_applies_whole(base)
        assert (made == b"") == (snapshot(house.workspace) == snapshot(pristine))

    check()


def carry_out(root, kind, name, detail):
    path = root / name
    if kind in ("write", "link"):
        make_room(root, path)
        if kind == "link":
            path.symlink_to(os.fsdecode(detail))
        else:
            path.write_bytes(detail)
    elif kind == "delete":
        remove(path)
    elif kind == "chmod" and path.is_file() and not path.is_symlink():
        path.chmod(path.stat().st_mode ^ 0o111)
    elif kind == "move" and os.path.lexists(path) and not (root / detail).is_relative_to(path):
        kept = root / ".moving"
        path.rename(kept)
        make_room(root, root / detail)
        kept.rename(root / detail)


def make_room(root, path):
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


def test_what_a_killed_git_left_in_the_repository_is_in_nobodys_way(house):
    base = house.stage()
    (house.workspace / "new").write_text("new\n")
    made = house.patch(base)
    # It keeps its pack until it has written its reference, and locks that while it writes.
    for pack in (house.attempt / "repository.git" / "objects" / "pack").glob("*.pack"):
        pack.with_suffix(".keep").write_text("fast-import\n")
    (house.attempt / "repository.git" / "refs" / "sandbox" / "new.lock").touch()

    assert house.patch(base) == made


TOKEN = b"tok_5f9c1e77aa0b4d2c"


@pytest.mark.parametrize(
    ("content", "is_flagged"),
    [
        (b"\0" * 300_000 + b"key=" + TOKEN, True),
        (b"\0" * 300_000 + TOKEN + b"\0" * 300_000, True),
        (b"\0" * 300_000 + b"key=" + TOKEN[:-1], False),
        (base64.encodebytes(b"the key, told to nobody else, is " + TOKEN + b" and may be used by all"), True),
        (b"key=" + TOKEN, True),
    ],
    ids=["at the end of a binary", "in its middle", "another one", "wrapped in base64", "plain"],
)
def test_a_value_in_a_file_is_seen_however_git_writes_it_into_the_patch(house, content, is_flagged):
    base = house.stage()
    (house.workspace / "state.db").write_bytes(content)
    made, became = house.patch_looked_through(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert became == PatchResult(contains_secret=is_flagged)
    clone = house.apply(base, made)
    assert (clone / "state.db").read_bytes() == content


def test_a_value_in_a_link_is_seen(house):
    base = house.stage()
    (house.workspace / "link").symlink_to(TOKEN)
    _, became = house.patch_looked_through(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert became.contains_secret


def test_what_follows_a_value_is_not_looked_through_and_is_in_the_patch_all_the_same(house):
    base = house.stage()
    for name in ("a", "b", "c"):
        (house.workspace / name).write_text(f"{name}\n")
    looked_at = []

    def find_in_the_second(chunks):
        looked_at.append(b"".join(chunks))
        return looked_at[-1] == b"b\n"

    made, became = house.patch_looked_through(base, find_in_the_second)
    assert (became, looked_at) == (PatchResult(contains_secret=True), [b"a\n", b"b\n"])
    clone = house.apply(base, made)
    assert [(clone / name).read_text() for name in ("a", "b", "c")] == ["a\n", "b\n", "c\n"]


def test_a_value_that_was_in_the_repository_before_is_not_the_agents(house):
    house.upstream.commit({"old": TOKEN})
    base = house.stage()
    (house.workspace / "new").write_bytes(b"nothing of it\n")
    _, became = house.patch_looked_through(base, SecretRedactor({"TOKEN": TOKEN.decode()}).contains)
    assert not became.contains_secret
