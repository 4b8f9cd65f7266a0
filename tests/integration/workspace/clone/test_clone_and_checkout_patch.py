"""A patch in the manifest is applied before the agent starts, and is not part of the task's patch."""

import base64
import random
from itertools import pairwise

import pytest

from doubles.workspace_harness import run_git, snapshot
from sandbox.model.failure import AttemptError


@pytest.fixture
def manifest_patch(harness):
    """A user's local changes: an edited file, a new binary file, a deleted file, a changed mode and a link."""
    work = harness.upstream.work
    (work / "README.md").write_bytes(b"# Demo\r\nmine\n")
    (work / "deep").mkdir()
    (work / "deep" / "data.bin").write_bytes(b"\0\1\377" * 100)
    (work / "src" / "lib.py").unlink()
    (work / "src" / "app.py").chmod(0o755)
    (work / "link").symlink_to("README.md")
    run_git("add", "--all", directory=work)
    patch = run_git("diff", "--cached", "--binary", "--full-index", directory=work) + "\n"
    expected = snapshot(work)
    run_git("reset", "--quiet", "--hard", directory=work)
    return encoded(patch), expected


def encoded(patch):
    return base64.b64encode(patch.encode()).decode()


@pytest.mark.parametrize("pinned", [True, False])
def test_manifest_patch_is_committed_on_top_of_the_cloned_commit(harness, manifest_patch, pinned):
    patch, expected = manifest_patch
    tip = run_git("rev-parse", "HEAD", directory=harness.upstream.work)

    base = harness.stage(patch=patch, **({"commit": tip} if pinned else {}))

    assert snapshot(harness.workspace) == expected
    assert run_git("rev-parse", "HEAD", "HEAD^", "origin/main", directory=harness.workspace).split() == [base, tip, tip]
    assert run_git("status", "--porcelain", directory=harness.workspace) == ""
    assert run_git("log", "-1", "--format=%s", directory=harness.workspace) == "Changes submitted with the task"
    run_git("fsck", "--strict", directory=harness.workspace)


def test_task_patch_contains_only_changes_made_by_the_agent(harness, manifest_patch):
    patch, _ = manifest_patch
    base = harness.stage(patch=patch)
    (harness.workspace / "README.md").write_bytes(b"# Demo\r\nmine\nand the agent's\n")
    (harness.workspace / "new.txt").write_bytes(b"new\n")

    task_patch = harness.patch(base)

    assert sorted(line for line in task_patch.splitlines() if line.startswith(b"diff ")) == [
        b"diff --git a/README.md b/README.md",
        b"diff --git a/new.txt b/new.txt",
    ]
    assert b"-mine" not in task_patch
    run_git("apply", "-", directory=harness.upstream.work, stdin=base64.b64decode(patch))
    run_git("apply", "-", directory=harness.upstream.work, stdin=task_patch)
    assert (harness.upstream.work / "README.md").read_bytes() == b"# Demo\r\nmine\nand the agent's\n"


def test_manifest_patch_gives_the_same_commit_in_each_attempt(harness, manifest_patch):
    assert harness.stage(patch=manifest_patch[0]) == harness.stage(patch=manifest_patch[0])


def test_manifest_patch_applies_to_a_sha256_repository(make_harness):
    harness = make_harness("--object-format=sha256")
    harness.upstream.commit({"a": b"1\n"})
    base = harness.stage(patch=encoded(new_file("b", content="2")))
    assert (len(base), (harness.workspace / "b").read_bytes()) == (64, b"2\n")


def new_file(path, mode="100644", content="owned", end=""):
    head = f"diff --git a/{path} b/{path}\nnew file mode {mode}\n"
    return f"{head}--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{content}\n{end}"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (new_file("../outside"), "invalid path '../outside'"),
        (new_file("/tmp/outside"), "invalid path '/tmp/outside'"),
        (new_file(".git/config"), "invalid path '.git/config'"),
        (new_file("src/.git/hooks/post-checkout", "100755"), "invalid path 'src/.git/hooks/post-checkout'"),
        (new_file("README.md/below"), ""),
        ("this is no patch\n", "No valid patches in input"),
        ("\x1b]0;owned\x07\n", "No valid patches in input"),
        (new_file("\x1b]0;owned\x07/../x"), "invalid path"),
        (new_file("a").replace("+owned", ""), "corrupt patch"),
        (new_file("README.md"), "already exists"),
        (
            "diff --git a/README.md b/README.md\n--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-# Another\n+# Mine\n",
            "patch does not apply",
        ),
    ],
)
def test_invalid_initial_patch_fails_the_clone(harness, patch, message):
    with pytest.raises(AttemptError, match=r"repository.patch does not apply to commit [0-9a-f]{12}: .") as caught:
        harness.stage(patch=encoded(patch))
    assert caught.value.code == "clone_failed"
    assert message in caught.value.message
    assert caught.value.message.isprintable()
    assert not (harness.attempt_dir / "outside").exists()
    assert "owned" not in (harness.attempt_dir / "repository.git" / "config").read_text()


def test_link_in_an_initial_patch_is_not_followed(harness, tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    link_patch = new_file("out", "120000", str(target), "\\ No newline at end of file\n")
    with pytest.raises(AttemptError, match="does not apply"):
        harness.stage(patch=encoded(link_patch + new_file("out/file")))
    assert list(target.iterdir()) == []
    harness.stage(patch=encoded(link_patch))
    assert (harness.workspace / "out").is_symlink()
    assert list(target.iterdir()) == []


def write_patches(tmp_path, *texts):
    paths = [tmp_path / f"inherited-{number}.patch" for number in range(1, len(texts) + 1)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


@pytest.mark.parametrize("sends_patch", [False, True])
def test_each_patch_of_an_earlier_task_becomes_one_commit(harness, manifest_patch, tmp_path, sends_patch):
    tip = run_git("rev-parse", "HEAD", directory=harness.upstream.work)
    change = "--- a/new\n+++ b/new\n@@ -1 +1 @@\n-owned\n+changed\n"
    paths = write_patches(tmp_path, new_file("new"), f"# skipped, a socket: x\ndiff --git a/new b/new\n{change}")
    sent = {"patch": manifest_patch[0]} if sends_patch else {}

    base = harness.stage(commit=tip, patches=paths, **sent)

    subjects = run_git("log", "--format=%s", f"{tip}..HEAD", directory=harness.workspace).splitlines()
    assert subjects == ["Changes of an earlier task"] * 2 + ["Changes submitted with the task"] * sends_patch
    assert run_git("rev-parse", "HEAD", directory=harness.workspace) == base
    assert (harness.workspace / "new").read_text() == "changed\n"
    assert run_git("status", "--porcelain", directory=harness.workspace) == ""
    run_git("fsck", "--strict", directory=harness.workspace)
    (harness.workspace / "new").write_text("once more\n")
    first = run_git("rev-parse", "HEAD~2", directory=harness.workspace)
    assert b"+once more" in harness.patch(first)
    assert b"-changed" in harness.patch(base)


@pytest.mark.parametrize(
    "patch",
    ["not a patch", new_file(".git/hooks/post-checkout", "100755"), new_file("../escaped"), new_file("README.md")],
)
def test_patch_of_an_earlier_task_that_does_not_apply_fails_the_clone(harness, tmp_path, patch):
    message = r"The work of an earlier task \(inherited-2.patch\) does not apply to commit [0-9a-f]{12}: ."
    with pytest.raises(AttemptError, match=message):
        harness.stage(patches=write_patches(tmp_path, new_file("new"), patch))
    harness.stage(patches=write_patches(tmp_path, new_file("new"), new_file("newer")))


def test_disk_space_for_the_patches_of_a_chain_is_bounded(harness, tmp_path):
    lines = [random.Random(number).randbytes(54).hex() for number in range(20_000)]
    harness.upstream.commit({"big.txt": "".join(f"{line}\n" for line in lines).encode()})
    head = "diff --git a/big.txt b/big.txt\n--- a/big.txt\n+++ b/big.txt\n@@ -1,2 +1,2 @@\n"
    first = [lines[0], *(f"{number}" for number in range(9))]
    texts = [f"{head}-{old}\n+{new}\n {lines[1]}\n" for old, new in pairwise(first)]
    harness.disk_bytes = 4 * 1024**2
    message = r"The work of an earlier task \(inherited-4.patch\) cannot be applied: the files .* raise vm.disk"
    with pytest.raises(AttemptError, match=message) as caught:
        harness.stage(patches=write_patches(tmp_path, *texts))
    assert caught.value.code == "clone_failed"
    harness.stage(patches=write_patches(tmp_path, *texts[:3]))
    assert (harness.workspace / "big.txt").read_text().startswith(f"2\n{lines[1]}\n")
    repository = harness.attempt_dir / "repository.git"
    assert sum(path.stat().st_size for path in repository.rglob("*") if path.is_file()) < harness.disk_bytes
