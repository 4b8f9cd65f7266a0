"""Work that came with the manifest is there before the agent begins, and no part of its patch."""

import base64

import pytest

from doubles.workspace_fixture import run_git, snapshot
from sandbox.model.errors import AttemptError


@pytest.fixture
def sent(house):
    """What a person has changed since the commit: a change, a new binary file, a file gone, a mode, a link."""
    work = house.upstream.work
    (work / "README.md").write_bytes(b"# Demo\r\nmine\n")
    (work / "deep").mkdir()
    (work / "deep" / "data.bin").write_bytes(b"\0\1\377" * 100)
    (work / "src" / "lib.py").unlink()
    (work / "src" / "app.py").chmod(0o755)
    (work / "link").symlink_to("README.md")
    run_git("add", "--all", directory=work)
    patch = run_git("diff", "--cached", "--binary", "--full-index", directory=work) + "\n"
    wanted = snapshot(work)
    run_git("reset", "--quiet", "--hard", directory=work)
    return encoded(patch), wanted


def encoded(patch):
    return base64.b64encode(patch.encode()).decode()


@pytest.mark.parametrize("pinned", [True, False])
def test_the_agent_begins_with_what_was_sent_as_a_commit_upon_the_cloned_one(house, sent, pinned):
    patch, wanted = sent
    tip = run_git("rev-parse", "HEAD", directory=house.upstream.work)

    base = house.stage(patch=patch, **({"commit": tip} if pinned else {}))

    assert snapshot(house.workspace) == wanted
    assert run_git("rev-parse", "HEAD", "HEAD^", "origin/main", directory=house.workspace).split() == [base, tip, tip]
    assert run_git("status", "--porcelain", directory=house.workspace) == ""
    assert run_git("log", "-1", "--format=%s", directory=house.workspace) == "Work that came with the task"
    run_git("fsck", "--strict", directory=house.workspace)


def test_the_tasks_patch_has_the_agents_changes_alone_and_applies_to_what_was_sent(house, sent):
    patch, _ = sent
    base = house.stage(patch=patch)
    (house.workspace / "README.md").write_bytes(b"# Demo\r\nmine\nand the agent's\n")
    (house.workspace / "new.txt").write_bytes(b"new\n")

    made = house.patch(base)

    assert sorted(line for line in made.splitlines() if line.startswith(b"diff ")) == [
        b"diff --git a/README.md b/README.md",
        b"diff --git a/new.txt b/new.txt",
    ]
    assert b"-mine" not in made
    run_git("apply", "-", directory=house.upstream.work, stdin=base64.b64decode(patch))
    run_git("apply", "-", directory=house.upstream.work, stdin=made)
    assert (house.upstream.work / "README.md").read_bytes() == b"# Demo\r\nmine\nand the agent's\n"


def test_the_same_work_makes_the_same_commit_in_every_attempt(house, sent):
    assert house.stage(patch=sent[0]) == house.stage(patch=sent[0])


def test_a_repository_with_longer_names_takes_sent_work_too(make_house):
    house = make_house("--object-format=sha256")
    house.upstream.commit({"a": b"1\n"})
    base = house.stage(patch=encoded(new_file("b", content="2")))
    assert (len(base), (house.workspace / "b").read_bytes()) == (64, b"2\n")


def new_file(path, mode="100644", content="owned", end=""):
    head = f"diff --git a/{path} b/{path}\nnew file mode {mode}\n"
    return f"{head}--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{content}\n{end}"


@pytest.mark.parametrize(
    ("patch", "complaint"),
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
def test_a_patch_that_does_not_belong_here_fails_the_clone_and_touches_nothing(house, patch, complaint):
    with pytest.raises(AttemptError, match=r"repository.patch does not apply to commit [0-9a-f]{12}: .") as caught:
        house.stage(patch=encoded(patch))
    assert caught.value.code == "clone_failed"
    assert complaint in caught.value.message
    assert caught.value.message.isprintable()
    assert not (house.attempt / "outside").exists()
    assert "owned" not in (house.attempt / "repository.git" / "config").read_text()


def test_a_link_that_was_sent_leads_nothing_of_the_hosts_anywhere(house, tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    through = new_file("out", "120000", str(target), "\\ No newline at end of file\n")
    with pytest.raises(AttemptError, match="does not apply"):
        house.stage(patch=encoded(through + new_file("out/file")))
    assert list(target.iterdir()) == []
    house.stage(patch=encoded(through))
    assert (house.workspace / "out").is_symlink()
    assert list(target.iterdir()) == []
