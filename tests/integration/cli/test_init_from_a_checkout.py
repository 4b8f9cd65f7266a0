"""`sandbox init`: a manifest by asking, from the checkout that one is in."""

import pytest
import yaml

from doubles.live import git

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


def test_what_makes_no_manifest_is_not_written(sandbox, tmp_path):
    result = sandbox("init", "--yes", "--set", "vm.cpus=many")
    assert result.returncode == 9
    told = result.stderr.decode()
    assert "manifest: repository.url: is required" in told
    assert "manifest: vm.cpus: must be a whole number" in told
    assert not (tmp_path / "task.yaml").exists()
