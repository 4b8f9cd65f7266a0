"""`sandbox init`: a manifest by asking, from the checkout that one is in."""

import pytest
import yaml

from doubles.live_server import git

URL = "https://github.com/org/app.git"


@pytest.fixture
def checkout(tmp_path):
    directory = tmp_path / "app"
    directory.mkdir()
    git("init", "-q", "-b", "main", ".", cwd=directory)
    git("commit", "-q", "--allow-empty", "-m", "Begin", cwd=directory)
    git("remote", "add", "origin", URL, cwd=directory)
    git("update-ref", "refs/remotes/origin/main", "HEAD", cwd=directory)
    return directory


def test_without_questions_the_checkout_and_defaults_make_a_valid_manifest(sandbox, checkout):
    result = sandbox("init", "--yes", "--set", "claude.prompt=Mend it.", cwd=checkout)
    assert (result.returncode, result.stdout) == (0, b""), result.stderr
    assert yaml.safe_load((checkout / "task.yaml").read_text()) == {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task for app"},
        "repository": {"url": URL, "branch": "main"},
        "claude": {"prompt": "Mend it."},
        "vm": {"network_mode": "isolated"},
        "lifecycle": {"timeout": "1h"},
    }
    assert sandbox("task", "validate", "task.yaml", cwd=checkout).returncode == 0


def test_questions_are_asked_until_the_answers_make_sense(on_terminal, terminal, tmp_path):
    process = on_terminal("init", "mine.yaml")
    answers = [
        (b"Repository:", "not an address"),
        (b"must be https://", URL),
        (b"Branch:", "main"),
        (b"What is to be done:", "Mend the tests."),
        (b"Name [", ""),
        (b"[isolated]:", "outbound"),
        (b"with commas:", "example.org, *.example.com"),
        (b"[1h]:", "soon"),
        (b"whole number", "30m"),
        (b"[none]:", "report.md"),
    ]
    for question, answer in answers:
        terminal.read_until(question)
        terminal.seen = b""
        terminal.type(answer.encode() + b"\n")
    terminal.read_to_end(process)
    assert process.returncode == 0
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert written["vm"] == {"network_mode": "outbound", "allowed_hosts": ["example.org", "*.example.com"]}
    assert (written["lifecycle"], written["claude"]) == (
        {"timeout": "30m", "artifact_patterns": ["report.md"]},
        {"prompt": "Mend the tests."},
    )


def test_a_manifest_can_go_to_stdout(sandbox, checkout):
    result = sandbox("init", "--yes", "-", cwd=checkout)
    assert yaml.safe_load(result.stdout)["repository"]["branch"] == "main"
    assert list(checkout.glob("*.yaml")) == []


def test_a_text_that_looks_like_a_number_stays_one(sandbox, checkout):
    result = sandbox("init", "--yes", "--set", 'metadata.name="12e0345"', cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert '  name: "12e0345"\n' in (checkout / "task.yaml").read_text()
    assert sandbox("task", "validate", "task.yaml", cwd=checkout).returncode == 0


def test_a_file_that_is_there_is_not_written_over(sandbox, checkout):
    (checkout / "task.yaml").write_text("mine\n")
    result = sandbox("init", "--yes", cwd=checkout)
    assert (result.returncode, (checkout / "task.yaml").read_text()) == (4, "mine\n")
    assert sandbox("init", "--yes", "--force", cwd=checkout).returncode == 0


def test_off_a_terminal_nobody_is_asked(sandbox, checkout):
    result = sandbox("init", cwd=checkout)
    assert (result.returncode, b"--yes" in result.stderr) == (2, True)
    assert list(checkout.glob("*.yaml")) == []


def test_what_makes_no_manifest_is_not_written(sandbox, checkout):
    result = sandbox("init", "--yes", "--set", "vm.cpus=many", "--set", "repository.url=file:///etc", cwd=checkout)
    assert result.returncode == 9
    told = result.stderr.decode()
    assert "manifest: repository.url: must be" in told
    assert "manifest: vm.cpus: must be a whole number" in told
    assert not (checkout / "task.yaml").exists()


@pytest.fixture(params=["outside", "without a remote"])
def bare(request, checkout, tmp_path):
    """A directory that says nothing of a repository, and the reason."""
    if request.param == "outside":
        return tmp_path, f"{tmp_path} is not in a git checkout"
    git("remote", "remove", "origin", cwd=checkout)
    return checkout, f"{checkout} has no remote"


def test_where_nothing_says_which_repository_is_meant_it_is_asked_for_by_option(sandbox, bare):
    directory, reason = bare
    result = sandbox("init", "--yes", cwd=directory)
    assert result.returncode == 2
    assert result.stderr.decode().splitlines() == [
        f"Error: {reason}, so nothing says which repository the task is for.",
        "  Say it: add --set repository.url=URL --set repository.branch=BRANCH",
    ]
    half = sandbox("init", "--yes", "--set", f"repository.url={URL}", cwd=directory)
    assert half.stderr.decode().splitlines()[-1] == "  Say it: add --set repository.branch=BRANCH"
    settings = ("--set", f"repository.url={URL}", "--set", "repository.branch=main")
    assert sandbox("init", "--yes", *settings, cwd=directory).returncode == 0
    assert yaml.safe_load((directory / "task.yaml").read_text())["repository"] == {"url": URL, "branch": "main"}


def test_a_checkout_without_a_remote_is_asked_as_one_is_outside_of_any(on_terminal, terminal, bare):
    on_terminal("init", cwd=bare[0])
    terminal.read_until(b"Repository:")


def test_a_prompt_that_is_still_to_be_written_is_told(sandbox, checkout):
    result = sandbox("init", "--yes", cwd=checkout)
    assert result.stderr.decode().splitlines() == [
        "Wrote task.yaml.",
        "  First say in it what is to be done: claude.prompt",
        "  Submit it and watch: sandbox task submit task.yaml --follow",
    ]
    written = sandbox("init", "--yes", "--force", "--set", "claude.prompt=Mend it.", cwd=checkout)
    assert b"claude.prompt" not in written.stderr
