"""`sandbox task diff` and `apply`: a task's patch on a terminal, in a pipe, and in the user's checkout."""

import json
import os
import signal
import subprocess

import click
import pytest

from doubles.deployment import git, wait_until
from doubles.fake_api import error_response, json_response
from doubles.sample_task import TASK_ID, task_status
from sandbox.cli.checkout.patch_application import apply_patch
from sandbox.cli.checkout.user_checkout import Checkout

BEFORE = {"a.txt": "one\ntwo\nthree\n", "b.sql": "-- x\nselect 1;\n"}
SECRET_FLAG = "--allow-secrets"


@pytest.fixture
def checkout(tmp_path):
    """A clean checkout at the base commit of the task."""
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
    """The patch of the task, with a new file and a file that contains a terminal escape sequence."""
    (checkout / "a.txt").write_text("one\n2\nthree\nfour\n")
    (checkout / "b.sql").write_text("select 1;\n")
    (checkout / "new.bin").write_bytes(b"\0\1\2" * 10)
    (checkout / "esc").write_text("\x1b]0;owned\x07\n")
    git("add", "-A", ".", cwd=checkout)
    diff = git("diff", "--cached", "--binary", "--full-index", cwd=checkout).encode()
    git("reset", "-q", "--hard", cwd=checkout)
    return diff


@pytest.fixture
def served_patch(serve_patch, patch, checkout):
    serve_patch(patch, git("rev-parse", "HEAD", cwd=checkout).strip())


def test_piped_diff_is_accepted_by_git_apply(run_cli, served_patch, patch, checkout):
    result = run_cli("task", "diff", TASK_ID)
    assert (result.returncode, result.stdout, result.stderr) == (0, patch, b"")
    subprocess.run(["git", "apply", "--check", "-"], input=result.stdout, cwd=checkout, check=True, timeout=60)


def test_json_diff_is_one_document(run_cli, served_patch, patch):
    assert json.loads(run_cli("task", "diff", TASK_ID, "-f", "json").stdout) == {
        "task_id": TASK_ID,
        "patch": patch.decode(),
    }


def test_json_diff_preserves_foreign_line_endings(run_cli, serve_patch):
    patch = b"--- a/x\r\n+++ b/x\r\n@@ -1 +1 @@\n-one\r\n+two\rthree\r\n+caf\xe9\n"
    serve_patch(patch, None)
    document = json.loads(run_cli("task", "diff", TASK_ID, "-f", "json").stdout)
    assert document["patch"] == patch.decode(errors="replace")


def test_empty_patch_is_reported(run_cli, serve_patch, checkout):
    serve_patch(b"", None)
    for command in ("diff", "apply"):
        result = run_cli("task", command, TASK_ID, cwd=checkout)
        assert (result.returncode, result.stdout) == (0, b"")
        assert b"changed nothing" in result.stderr


@pytest.mark.parametrize("command", ["diff", "apply"])
def test_patch_with_a_secret_needs_a_flag(run_cli, serve_patch, patch, checkout, command):
    serve_patch(patch, None, contains_secret=True)
    result = run_cli("task", command, TASK_ID, cwd=checkout)
    assert (result.returncode, result.stdout) == (5, b"")
    assert git("status", "--porcelain", cwd=checkout) == ""
    assert run_cli("task", command, TASK_ID, SECRET_FLAG, cwd=checkout).returncode == 0


def test_apply_changes_the_checkout_and_lists_the_files(run_cli, served_patch, checkout):
    (checkout / "untracked").write_text("mine")
    (checkout / "below").mkdir()
    result = run_cli("task", "apply", TASK_ID, cwd=checkout / "below")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines == ["+2 -1  a.txt", "+0 -1  b.sql", "+1 -0  esc", "binary  new.bin"]
    assert result.stderr == b"Applied to 4 files and staged. See the changes with: git diff --cached\n"
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"
    assert (checkout / "new.bin").read_bytes() == b"\0\1\2" * 10
    assert git("status", "--porcelain", cwd=checkout).splitlines() == [
        "M  a.txt", "M  b.sql", "A  esc", "A  new.bin", "?? untracked",
    ]  # fmt: skip


def test_json_apply_lists_files_and_both_commits(run_cli, served_patch, checkout, tmp_path):
    result = run_cli("task", "apply", TASK_ID, "--directory", str(checkout), "-f", "json", cwd=tmp_path)
    document = json.loads(result.stdout)
    assert document["files"][0] == {"path": "a.txt", "added": 2, "removed": 1}
    assert document["files"][3] == {"path": "new.bin", "added": None, "removed": None}
    assert document["base_commit"] == document["commit"] == git("rev-parse", "HEAD", cwd=checkout).strip()
    assert document["directory"] == str(checkout)


def test_apply_to_another_commit_warns_and_applies(run_cli, served_patch, checkout):
    (checkout / "other").write_text("x")
    base = git("rev-parse", "HEAD", cwd=checkout).strip()
    git("add", "other", cwd=checkout)
    git("commit", "-q", "-m", "Continue", cwd=checkout)
    here = git("rev-parse", "HEAD", cwd=checkout).strip()
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 0
    message = f"The patch was made on commit {base[:12]}; this checkout is at {here[:12]}.\n"
    assert result.stderr.decode().startswith(message)


@pytest.mark.parametrize(
    ("status", "code"), [(404, "artifact_not_found"), (403, "artifact_contains_secret"), (403, "forbidden")]
)
def test_apply_works_without_a_known_base_commit(run_cli, served_patch, checkout, api, status, code):
    metadata = f"/tasks/{TASK_ID}/artifacts/.sandbox%2Fmetadata.json"
    api.on("GET", metadata, error_response(status, code, "Not this one."))
    result = run_cli("task", "apply", TASK_ID, "-f", "json", cwd=checkout)
    assert (result.returncode, result.stderr) == (0, b"")
    document = json.loads(result.stdout)
    assert (document["base_commit"], len(document["files"])) == (None, 4)


def test_apply_rejects_a_dirty_checkout(run_cli, served_patch, checkout, api):
    (checkout / "b.sql").write_text("mine\n")
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert (result.returncode, api.requests) == (4, [])
    assert b"uncommitted" in result.stderr
    assert (checkout / "a.txt").read_text() == BEFORE["a.txt"]


def test_conflicting_patch_changes_nothing(run_cli, served_patch, checkout):
    (checkout / "b.sql").write_text("select 2;\n")
    git("commit", "-q", "-a", "-m", "Change", cwd=checkout)
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 4
    assert b"does not apply to this checkout, so nothing was applied.\n  " in result.stderr
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_apply_never_overwrites_an_untracked_file(run_cli, served_patch, checkout):
    (checkout / "new.bin").write_bytes(b"mine")
    assert run_cli("task", "apply", TASK_ID, cwd=checkout).returncode == 4
    assert (checkout / "new.bin").read_bytes() == b"mine"


ESCAPING_PATCH = b"""\
diff --git a/%s b/%s
new file mode 100644
--- /dev/null
+++ b/%s
@@ -0,0 +1 @@
+owned
"""


@pytest.mark.parametrize("path", [b"../escaped", b".git/hooks/post-checkout", b"/tmp/escaped-from-a-checkout"])
def test_patch_cannot_escape_the_checkout(run_cli, serve_patch, checkout, tmp_path, path):
    serve_patch(ESCAPING_PATCH.replace(b"%s", path), None)
    assert run_cli("task", "apply", TASK_ID, cwd=checkout).returncode == 4
    assert not (tmp_path / "escaped").exists()
    assert not (checkout / ".git" / "hooks" / "post-checkout").exists()


@pytest.mark.parametrize("options", [(), ("--beside-changes",)])
def test_patch_does_not_write_below_a_symbolic_link(run_cli, serve_patch, checkout, tmp_path, options):
    """git refuses to follow only the links that it tracks or that the patch creates."""
    (tmp_path / "outside").mkdir()
    (checkout / "node_modules").symlink_to(tmp_path / "outside")
    serve_patch(ESCAPING_PATCH.replace(b"%s", b"node_modules/f"), None)
    result = run_cli("task", "apply", TASK_ID, *options, cwd=checkout)
    assert result.returncode == 4
    assert b"below a symbolic link" in result.stderr
    assert b"node_modules" in result.stderr
    assert not list((tmp_path / "outside").iterdir())
    (checkout / "node_modules").unlink()
    assert run_cli("task", "apply", TASK_ID, *options, cwd=checkout).returncode == 0
    assert (checkout / "node_modules" / "f").read_text() == "owned\n"


@pytest.mark.parametrize(
    ("link", "directory"), [(b"A", b"a"), (b"x/Stra\xc3\x9fe", b"x/strasse"), (b"e\xcc\x81", b"\xc3\xa9")]
)
def test_patch_does_not_write_below_its_own_link_in_another_spelling(
    run_cli, serve_patch, checkout, tmp_path, link, directory
):
    """On a file system that ignores case, the directory is the link."""
    (tmp_path / "outside").mkdir()
    target = str(tmp_path / "outside").encode()
    link_patch = ESCAPING_PATCH.replace(b"100644", b"120000").replace(b"owned", target).replace(b"%s", link)
    link_patch += b"\\ No newline at end of file\n"
    serve_patch(link_patch + ESCAPING_PATCH.replace(b"%s", directory + b"/f"), None)
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 4
    assert b"differ only in case" in result.stderr
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_patch_may_have_names_that_differ_only_in_case(run_cli, serve_patch, checkout):
    patches = [ESCAPING_PATCH.replace(b"%s", name) for name in (b"dir/Makefile", b"Dir/makefile", b"dirs")]
    serve_patch(b"".join(patches), None)
    assert run_cli("task", "apply", TASK_ID, cwd=checkout).returncode == 0
    assert (checkout / "Dir" / "makefile").read_text() == "owned\n"


@pytest.fixture
def install_filter(checkout):
    """Configure a smudge filter, which git runs after it has removed the files that the patch changes."""

    def configure(program: str) -> None:
        (checkout / ".git" / "info" / "attributes").write_text("*.txt filter=slow\n")
        git("config", "filter.slow.smudge", program, cwd=checkout)

    return configure


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_deferred_until_the_patch_is_applied(
    start_cli, served_patch, checkout, install_filter, tmp_path, number
):
    install_filter(f"touch {tmp_path}/started; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; cat")
    options = {"start_new_session": True, "stderr": subprocess.PIPE}
    process = start_cli("task", "apply", TASK_ID, cwd=checkout, **options)
    wait_until((tmp_path / "started").exists, description="git to write the first file")
    assert (checkout / "a.txt").read_text() == ""
    os.killpg(process.pid, number)
    (tmp_path / "go").touch()
    assert b"The patch is already applied." in process.communicate(timeout=30)[1]
    assert process.returncode in {130, -number}
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"
    assert (checkout / "new.bin").exists()
    assert not list((checkout / ".git").glob("sandbox-kept*"))


def test_hanging_filter_is_killed_and_files_are_restored(checkout, install_filter, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.cli.checkout.patch_application.APPLY_TIMEOUT_SECONDS", 1.0)
    (checkout / "a.txt").write_text("changed\n")
    (tmp_path / "patch").write_text(git("diff", "--full-index", cwd=checkout) + "\n")
    git("checkout", "-q", "a.txt", cwd=checkout)
    install_filter("sleep 600")
    with pytest.raises(click.exceptions.Exit) as raised:
        apply_patch(Checkout(checkout), tmp_path / "patch")
    assert (raised.value.exit_code, (checkout / "a.txt").read_text()) == (4, BEFORE["a.txt"])
    assert not (checkout / ".git" / "index.lock").exists()


def test_apply_is_rolled_back_after_git_is_killed(run_cli, served_patch, checkout, install_filter):
    install_filter('kill -9 "$PPID"')
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 4
    assert b"all files were restored" in result.stderr
    assert {name: (checkout / name).read_text() for name in BEFORE} == BEFORE
    assert not (checkout / "new.bin").exists()
    [backup] = (checkout / ".git").glob("sandbox-kept*")
    assert [path.name for path in backup.iterdir()] == ["found"]
    assert f"The replaced content is in {backup / 'found'}.".encode() in result.stderr


def test_rollback_restores_a_renamed_file_and_its_mode(run_cli, serve_patch, checkout, install_filter):
    (checkout / "a.txt").chmod(0o755)
    git("commit", "-q", "-a", "-m", "Make it executable", cwd=checkout)
    (checkout / "below").mkdir()
    git("mv", "a.txt", "below/moved.txt", cwd=checkout)
    serve_patch(git("diff", "--cached", "-M", "--full-index", cwd=checkout).encode(), None)
    git("reset", "-q", "--hard", cwd=checkout)
    install_filter('kill -9 "$PPID"')
    assert run_cli("task", "apply", TASK_ID, cwd=checkout).returncode == 4
    assert ((checkout / "a.txt").read_text(), (checkout / "below").exists()) == (BEFORE["a.txt"], False)
    assert (checkout / "a.txt").stat().st_mode & 0o777 == 0o755


def test_apply_writes_files_outside_a_sparse_checkout(run_cli, served_patch, checkout):
    git("config", "core.sparseCheckout", "true", cwd=checkout)
    (checkout / ".git" / "info" / "sparse-checkout").write_text("/b.sql\n")
    git("read-tree", "-mu", "HEAD", cwd=checkout)
    assert not (checkout / "a.txt").exists()
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\nfour\n"


@pytest.mark.parametrize("has_tar", [True, False])
def test_apply_reports_files_missing_from_the_patch(run_cli, serve_patch, patch, checkout, has_tar):
    serve_patch(b"# left out, too large for a patch: big.bin\n" + patch, None, has_tar=has_tar)
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert (result.returncode, (checkout / "a.txt").read_text()) == (0, "one\n2\nthree\nfour\n")
    assert b"Not everything is in the patch:\n  left out, too large for a patch: big.bin\n" in result.stderr
    assert (f"sandbox task download {TASK_ID} {TASK_ID}.changes.tar".encode() in result.stderr) == has_tar


def test_truncated_empty_patch_fails(run_cli, serve_patch, checkout):
    serve_patch(b"# truncated: creating it took longer than 60.0 s\n", None, has_tar=True)
    result = run_cli("task", "apply", TASK_ID, cwd=checkout)
    assert result.returncode == 4
    assert result.stderr.decode().splitlines() == [
        "Not everything is in the patch:",
        "  truncated: creating it took longer than 60.0 s",
        f"  Download all new and changed files: sandbox task download {TASK_ID} {TASK_ID}.changes.tar",
        "Error: The patch contains nothing that git can apply.",
    ]


def test_apply_outside_a_checkout_is_a_usage_error(run_cli, served_patch, tmp_path):
    (tmp_path / "plain").mkdir()
    result = run_cli("task", "apply", TASK_ID, cwd=tmp_path / "plain")
    assert result.returncode == 2
    assert b"is not in a git checkout" in result.stderr


def test_terminal_diff_is_colored_escaped_and_paged(served_patch, on_terminal, terminal, environment, tmp_path):
    pager = f"sed 's/^/> /' | tee {tmp_path / 'paged'}"
    (tmp_path / ".gitconfig").write_text(f'[core]\n\tpager = "{pager}"\n')
    process = on_terminal("task", "diff", TASK_ID)
    output = terminal.read_until(b"selec")
    assert process.wait(30) == 0
    pager_output = (tmp_path / "paged").read_bytes()
    assert b"\x1b[32m+2\x1b[m\n" in pager_output
    assert b"\x1b[31m--- x\x1b[m\n" in pager_output
    assert rb"+\x1b]0;owned\x07" in pager_output
    assert b"\x1b]0;" not in pager_output
    assert b"> " in output


def test_disabled_pager_is_not_used(served_patch, on_terminal, terminal, tmp_path):
    config = '[core]\n\tpager = "touch paged; cat"\n[pager]\n\tdiff = false\n'
    (tmp_path / ".gitconfig").write_text(config)
    process = on_terminal("task", "diff", TASK_ID, "--no-color")
    output = terminal.read_until(b"new.bin")
    assert process.wait(30) == 0
    assert b"\x1b[" not in output
    assert not (tmp_path / "paged").exists()


def test_pager_that_exits_early_ends_the_command_silently(serve_patch, on_terminal, terminal, tmp_path):
    serve_patch(b"+line\n" * 200_000, None)
    (tmp_path / ".gitconfig").write_text('[core]\n\tpager = "head -n 1"\n')
    assert on_terminal("task", "diff", TASK_ID).wait(30) == 0
    assert b"Traceback" not in terminal.read_until(b"line")


@pytest.mark.parametrize(
    ("state", "advice"), [("running", b"sandbox task wait"), ("cancelled", b"sandbox task status")]
)
@pytest.mark.parametrize("command", ["diff", "apply"])
def test_missing_patch_error_depends_on_the_task_state(run_cli, api, checkout, command, state, advice):
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": []}))
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status(state)))
    result = run_cli("task", command, TASK_ID, cwd=checkout)
    assert result.returncode == 3
    assert advice in result.stderr
