"""`sandbox task diff` and `apply`: a task's patch on the screen, in a pipe, and in the user's own checkout."""

import hashlib
import json
import os
import signal
import subprocess

import click
import pytest

from doubles.live_server import git, until
from doubles.recorded_api import Answer, of_error, of_json
from doubles.recorded_task import TASK, status
from sandbox.cli.checkout.worktree import Checkout

BEFORE = {"a.txt": "one\ntwo\nthree\n", "b.sql": "-- x\nselect 1;\n"}
SECRET_FLAG = "--allow-secrets"


@pytest.fixture
def checkout(tmp_path):
    """A clean checkout at the commit that the task worked on."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    git("init", "-q", "-b", "main", ".", cwd=directory)
    for name, text in BEFORE.items():
        (directory / name).write_text(text)
    git("add", "-A", ".", cwd=directory)
    git("commit", "-q", "-m", "Begin", cwd=directory)
    return directory


@pytest.fixture
def patch(checkout):
    """What the task made of it, new and hostile file included."""
    (checkout / "a.txt").write_text("one\n2\nthree\nfour\n")
    (checkout / "b.sql").write_text("select 1;\n")
    (checkout / "new.bin").write_bytes(b"\0\1\2" * 10)
    (checkout / "esc").write_text("\x1b]0;owned\x07\n")
    git("add", "-A", ".", cwd=checkout)
    made = git("diff", "--cached", "--binary", "--full-index", cwd=checkout).encode()
    git("reset", "-q", "--hard", cwd=checkout)
    return made


@pytest.fixture
def offer(api):
    """Let the API have a patch, made on a commit."""

    def put(patch: bytes, base: str | None, *, contains_secret: bool = False, has_tar: bool = False) -> None:
        metadata = json.dumps({"repository": {"base_commit": base}}).encode()
        entries = []
        for name, data in ((f"{TASK}.patch", patch), ("metadata.json", metadata)):
            digest = hashlib.sha256(data).hexdigest()
            path = f"/tasks/{TASK}/artifacts/.sandbox%2F{name}"
            api.on(
                "GET", path, lambda asked, data=data, digest=digest: Answer(200, [data], {"X-Checksum-SHA256": digest})
            )
            entries.append({"name": name, "path": f".sandbox/{name}", "contains_secret": contains_secret})
        if has_tar:
            name = f"{TASK}.changes.tar"
            entries.append({"name": name, "path": f".sandbox/{name}", "contains_secret": False})
        api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": entries}))

    return put


@pytest.fixture
def offered(offer, patch, checkout):
    offer(patch, git("rev-parse", "HEAD", cwd=checkout).strip())


def test_a_piped_diff_is_what_git_apply_takes(sandbox, offered, patch, checkout):
    result = sandbox("task", "diff", TASK)
    assert (result.returncode, result.stdout, result.stderr) == (0, patch, b"")
    subprocess.run(["git", "apply", "--check", "-"], input=result.stdout, cwd=checkout, check=True, timeout=60)


def test_a_diff_in_json_is_one_document(sandbox, offered, patch):
    assert json.loads(sandbox("task", "diff", TASK, "-f", "json").stdout) == {"task_id": TASK, "patch": patch.decode()}


def test_a_diff_in_json_keeps_the_ends_of_lines_of_other_systems(sandbox, offer):
    patch = b"--- a/x\r\n+++ b/x\r\n@@ -1 +1 @@\n-one\r\n+two\rthree\r\n+caf\xe9\n"
    offer(patch, None)
    told = json.loads(sandbox("task", "diff", TASK, "-f", "json").stdout)["patch"]
    assert told == patch.decode(errors="replace")


def test_a_task_that_changed_nothing_says_so(sandbox, offer, checkout):
    offer(b"", None)
    for command in ("diff", "apply"):
        result = sandbox("task", command, TASK, cwd=checkout)
        assert (result.returncode, result.stdout) == (0, b"")
        assert b"changed nothing" in result.stderr


@pytest.mark.parametrize("command", ["diff", "apply"])
def test_a_patch_with_a_secret_in_it_has_to_be_asked_for(sandbox, offer, patch, checkout, command):
    offer(patch, None, contains_secret=True)
    result = sandbox("task", command, TASK, cwd=checkout)
    assert (result.returncode, result.stdout) == (5, b"")
    assert git("status", "--porcelain", cwd=checkout) == ""
    assert sandbox("task", command, TASK, SECRET_FLAG, cwd=checkout).returncode == 0


def test_apply_changes_the_checkout_and_says_what(sandbox, offered, checkout):
    (checkout / "untracked").write_text("mine")
    (checkout / "below").mkdir()
    result = sandbox("task", "apply", TASK, cwd=checkout / "below")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines == ["+2 -1  a.txt", "+0 -1  b.sql", "+1 -0  esc", "binary  new.bin"]
    assert result.stderr == b"Applied to 4 files and staged. Look at it with: git diff --cached\n"
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"
    assert (checkout / "new.bin").read_bytes() == b"\0\1\2" * 10
    assert git("status", "--porcelain", cwd=checkout).splitlines() == [
        "M  a.txt", "M  b.sql", "A  esc", "A  new.bin", "?? untracked",
    ]  # fmt: skip


def test_apply_in_json_tells_the_files_and_both_commits(sandbox, offered, checkout, tmp_path):
    result = sandbox("task", "apply", TASK, "--directory", str(checkout), "-f", "json", cwd=tmp_path)
    told = json.loads(result.stdout)
    assert told["files"][0] == {"path": "a.txt", "added": 2, "removed": 1}
    assert told["files"][3] == {"path": "new.bin", "added": None, "removed": None}
    assert told["base_commit"] == told["commit"] == git("rev-parse", "HEAD", cwd=checkout).strip()
    assert told["directory"] == str(checkout)


def test_apply_to_another_commit_says_so_and_goes_on_where_the_patch_fits(sandbox, offered, checkout):
    (checkout / "other").write_text("x")
    base = git("rev-parse", "HEAD", cwd=checkout).strip()
    git("add", "other", cwd=checkout)
    git("commit", "-q", "-m", "Go on", cwd=checkout)
    here = git("rev-parse", "HEAD", cwd=checkout).strip()
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert result.returncode == 0
    told = f"The patch was made on commit {base[:12]}; this checkout is at {here[:12]}.\n"
    assert result.stderr.decode().startswith(told)


@pytest.mark.parametrize(
    ("status", "code"), [(404, "artifact_not_found"), (403, "artifact_contains_secret"), (403, "forbidden")]
)
def test_a_patch_is_applied_though_nobody_tells_which_commit_it_was_made_on(
    sandbox, offered, checkout, api, status, code
):
    metadata = f"/tasks/{TASK}/artifacts/.sandbox%2Fmetadata.json"
    api.on("GET", metadata, of_error(status, code, "Not this one."))
    result = sandbox("task", "apply", TASK, "-f", "json", cwd=checkout)
    assert (result.returncode, result.stderr) == (0, b"")
    told = json.loads(result.stdout)
    assert (told["base_commit"], len(told["files"])) == (None, 4)


def test_apply_refuses_a_checkout_with_changes(sandbox, offered, checkout, api):
    (checkout / "b.sql").write_text("mine\n")
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert (result.returncode, api.asked) == (4, [])
    assert b"not committed" in result.stderr
    assert (checkout / "a.txt").read_text() == BEFORE["a.txt"]


def test_apply_changes_nothing_where_the_patch_does_not_fit(sandbox, offered, checkout):
    (checkout / "b.sql").write_text("select 2;\n")
    git("commit", "-q", "-a", "-m", "Change", cwd=checkout)
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert result.returncode == 4
    assert b"does not fit this checkout, so nothing was applied.\n  " in result.stderr
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_apply_never_overwrites_a_file_that_git_does_not_know(sandbox, offered, checkout):
    (checkout / "new.bin").write_bytes(b"mine")
    assert sandbox("task", "apply", TASK, cwd=checkout).returncode == 4
    assert (checkout / "new.bin").read_bytes() == b"mine"


ESCAPE = b"""\
diff --git a/%s b/%s
new file mode 100644
--- /dev/null
+++ b/%s
@@ -0,0 +1 @@
+owned
"""


@pytest.mark.parametrize("path", [b"../escaped", b".git/hooks/post-checkout", b"/tmp/escaped-from-a-checkout"])
def test_a_patch_cannot_leave_the_checkout(sandbox, offer, checkout, tmp_path, path):
    offer(ESCAPE.replace(b"%s", path), None)
    assert sandbox("task", "apply", TASK, cwd=checkout).returncode == 4
    assert not (tmp_path / "escaped").exists()
    assert not (checkout / ".git" / "hooks" / "post-checkout").exists()


@pytest.fixture
def filtered(checkout):
    """Let git, which has removed the files that a patch changes by then, write each through a program."""

    def put(program: str) -> None:
        (checkout / ".git" / "info" / "attributes").write_text("*.txt filter=slow\n")
        git("config", "filter.slow.smudge", program, cwd=checkout)

    return put


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_until_the_patch_is_applied(sandbox_process, offered, checkout, filtered, tmp_path, number):
    filtered(f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; cat")
    told = {"start_new_session": True, "stderr": subprocess.PIPE}
    process = sandbox_process("task", "apply", TASK, cwd=checkout, **told)
    until((tmp_path / "begun").exists, what="git to write the first file")
    assert (checkout / "a.txt").read_text() == ""
    os.killpg(process.pid, number)
    (tmp_path / "go").touch()
    assert b"All of the patch was applied before." in process.communicate(timeout=30)[1]
    assert process.returncode in {130, -number}
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"
    assert (checkout / "new.bin").exists()
    assert not list((checkout / ".git").glob("sandbox-kept*"))


def test_a_filter_that_does_not_end_is_ended_and_the_files_are_put_back(checkout, filtered, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.cli.checkout.worktree.APPLY_TIMEOUT_SECONDS", 1.0)
    (checkout / "a.txt").write_text("changed\n")
    (tmp_path / "patch").write_text(git("diff", "--full-index", cwd=checkout) + "\n")
    git("checkout", "-q", "a.txt", cwd=checkout)
    filtered("sleep 600")
    with pytest.raises(click.exceptions.Exit) as ended:
        Checkout(checkout).apply(tmp_path / "patch")
    assert (ended.value.exit_code, (checkout / "a.txt").read_text()) == (4, BEFORE["a.txt"])
    assert not (checkout / ".git" / "index.lock").exists()


def test_what_git_had_begun_when_it_was_killed_is_taken_back(sandbox, offered, checkout, filtered):
    filtered('kill -9 "$PPID"')
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert result.returncode == 4
    assert b"all files were put back as they were" in result.stderr
    assert {name: (checkout / name).read_text() for name in BEFORE} == BEFORE
    assert not (checkout / "new.bin").exists()
    [kept] = (checkout / ".git").glob("sandbox-kept*")
    assert [path.name for path in kept.iterdir()] == ["found"]
    assert f"What stood there instead is in {kept / 'found'}.".encode() in result.stderr


def test_a_file_that_was_renamed_away_comes_back_with_its_mode(sandbox, offer, checkout, filtered):
    (checkout / "a.txt").chmod(0o755)
    git("commit", "-q", "-a", "-m", "Let it run", cwd=checkout)
    (checkout / "below").mkdir()
    git("mv", "a.txt", "below/moved.txt", cwd=checkout)
    offer(git("diff", "--cached", "-M", "--full-index", cwd=checkout).encode(), None)
    git("reset", "-q", "--hard", cwd=checkout)
    filtered('kill -9 "$PPID"')
    assert sandbox("task", "apply", TASK, cwd=checkout).returncode == 4
    assert ((checkout / "a.txt").read_text(), (checkout / "below").exists()) == (BEFORE["a.txt"], False)
    assert (checkout / "a.txt").stat().st_mode & 0o777 == 0o755


def test_apply_writes_files_that_a_sparse_checkout_leaves_out(sandbox, offered, checkout):
    git("config", "core.sparseCheckout", "true", cwd=checkout)
    (checkout / ".git" / "info" / "sparse-checkout").write_text("/b.sql\n")
    git("read-tree", "-mu", "HEAD", cwd=checkout)
    assert not (checkout / "a.txt").exists()
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"


@pytest.mark.parametrize("has_tar", [True, False])
def test_apply_says_what_the_patch_does_not_hold_and_where_it_is(sandbox, offer, patch, checkout, has_tar):
    offer(b"# left out, too large for a patch: big.bin\n" + patch, None, has_tar=has_tar)
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert (result.returncode, (checkout / "a.txt").read_text()) == (0, "one\n2\nthree\nfour\n")
    assert b"Not everything is in the patch:\n  left out, too large for a patch: big.bin\n" in result.stderr
    assert (f"sandbox task download {TASK} {TASK}.changes.tar".encode() in result.stderr) == has_tar


def test_a_patch_of_which_nothing_could_be_kept_is_no_success(sandbox, offer, checkout):
    offer(b"# truncated: making it took longer than 60.0 s\n", None, has_tar=True)
    result = sandbox("task", "apply", TASK, cwd=checkout)
    assert result.returncode == 4
    assert result.stderr.decode().splitlines() == [
        "Not everything is in the patch:",
        "  truncated: making it took longer than 60.0 s",
        f"  Take all that is new or changed: sandbox task download {TASK} {TASK}.changes.tar",
        "Error: Nothing is in the patch that git could apply.",
    ]


def test_apply_outside_a_checkout_says_where_to_go(sandbox, offered, tmp_path):
    (tmp_path / "plain").mkdir()
    result = sandbox("task", "apply", TASK, cwd=tmp_path / "plain")
    assert result.returncode == 2
    assert b"is not in a git checkout" in result.stderr


def test_a_diff_on_a_terminal_is_coloured_and_harmless_and_goes_through_gits_pager(
    offered, on_terminal, terminal, environment, tmp_path
):
    pager = f"sed 's/^/> /' | tee {tmp_path / 'paged'}"
    (tmp_path / ".gitconfig").write_text(f'[core]\n\tpager = "{pager}"\n')
    process = on_terminal("task", "diff", TASK)
    shown = terminal.read_until(b"selec")
    assert process.wait(30) == 0
    paged = (tmp_path / "paged").read_bytes()
    assert b"\x1b[32m+2\x1b[m\n" in paged
    assert b"\x1b[31m--- x\x1b[m\n" in paged
    assert rb"+\x1b]0;owned\x07" in paged
    assert b"\x1b]0;" not in paged
    assert b"> " in shown


def test_a_user_who_wants_no_pager_for_diffs_gets_none(offered, on_terminal, terminal, tmp_path):
    config = '[core]\n\tpager = "touch paged; cat"\n[pager]\n\tdiff = false\n'
    (tmp_path / ".gitconfig").write_text(config)
    process = on_terminal("task", "diff", TASK, "--no-color")
    shown = terminal.read_until(b"new.bin")
    assert process.wait(30) == 0
    assert b"\x1b[" not in shown
    assert not (tmp_path / "paged").exists()


def test_a_pager_that_has_seen_enough_ends_the_command_quietly(offer, on_terminal, terminal, tmp_path):
    offer(b"+line\n" * 200_000, None)
    (tmp_path / ".gitconfig").write_text('[core]\n\tpager = "head -n 1"\n')
    assert on_terminal("task", "diff", TASK).wait(30) == 0
    assert b"Traceback" not in terminal.read_until(b"line")


@pytest.mark.parametrize(
    ("state", "advice"), [("running", b"sandbox task wait"), ("cancelled", b"sandbox task status")]
)
@pytest.mark.parametrize("command", ["diff", "apply"])
def test_who_asks_for_a_patch_that_is_not_there_is_told_whether_it_may_come(
    sandbox, api, checkout, command, state, advice
):
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": []}))
    api.on("GET", f"/tasks/{TASK}", of_json(status(state)))
    result = sandbox("task", command, TASK, cwd=checkout)
    assert result.returncode == 3
    assert advice in result.stderr
