"""`sandbox init` creates a manifest from the current checkout and from prompts."""

import pytest
import yaml

from doubles.deployment import git

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


def test_init_with_yes_option_writes_a_valid_manifest(run_cli, checkout):
    result = run_cli("init", "--yes", "--set", "claude.prompt=Fix it.", cwd=checkout)
    assert (result.returncode, result.stdout) == (0, b""), result.stderr
    assert yaml.safe_load((checkout / "task.yaml").read_text()) == {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "Fix it."},
        "repository": {"url": URL, "branch": "main"},
        "claude": {"prompt": "Fix it."},
        "vm": {"network_mode": "isolated"},
        "lifecycle": {"timeout": "1h"},
    }
    assert run_cli("task", "validate", "task.yaml", cwd=checkout).returncode == 0


def test_prompt_is_repeated_after_an_invalid_answer(on_terminal, terminal, tmp_path):
    process = on_terminal("init", "mine.yaml")
    answers = [
        (b"Repository:", "not a url"),
        (b"must be https://", URL),
        (b"Branch:", "main"),
        (b"Prompt:", "Fix the tests."),
        (b"Name [Fix the tests.]:", ""),
        (b"[isolated]:", "outbound"),
        (b"separated by commas:", "example.org, *.example.com"),
        (b"[1h]:", "soon"),
        (b"whole number", "30m"),
        (b"[none]:", "report.md"),
    ]
    for prompt, answer in answers:
        terminal.read_until(prompt)
        terminal.output = b""
        terminal.type(answer.encode() + b"\n")
    terminal.read_to_end(process)
    assert process.returncode == 0
    manifest = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert manifest["metadata"] == {"name": "Fix the tests."}
    assert manifest["vm"] == {"network_mode": "outbound", "allowed_hosts": ["example.org", "*.example.com"]}
    assert (manifest["lifecycle"], manifest["claude"]) == (
        {"timeout": "30m", "artifact_patterns": ["report.md"]},
        {"prompt": "Fix the tests."},
    )


def test_manifest_can_be_written_to_stdout(run_cli, checkout):
    result = run_cli("init", "--yes", "-", cwd=checkout)
    assert yaml.safe_load(result.stdout)["repository"]["branch"] == "main"
    assert list(checkout.glob("*.yaml")) == []


def test_numeric_looking_string_stays_a_string(run_cli, checkout):
    result = run_cli("init", "--yes", "--set", 'metadata.name="12e0345"', cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert '  name: "12e0345"\n' in (checkout / "task.yaml").read_text()
    assert run_cli("task", "validate", "task.yaml", cwd=checkout).returncode == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--set", "claude.prompt=Fix it.\nAll of it."], "Fix it."),
        (["--set", "claude.prompt=Fix it.", "--set", "metadata.name=Mine"], "Mine"),
        ([], "A task for app"),
    ],
)
def test_name_is_the_first_line_of_the_prompt_unless_set(run_cli, checkout, options, name):
    result = run_cli("init", "--yes", "-", *options, cwd=checkout)
    assert yaml.safe_load(result.stdout)["metadata"]["name"] == name


def test_existing_file_is_not_overwritten(run_cli, checkout):
    (checkout / "task.yaml").write_text("mine\n")
    result = run_cli("init", "--yes", cwd=checkout)
    assert (result.returncode, (checkout / "task.yaml").read_text()) == (4, "mine\n")
    assert run_cli("init", "--yes", "--force", cwd=checkout).returncode == 0


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_link_is_not_followed(run_cli, checkout, tmp_path, options):
    """An applied patch may contain the link."""
    (checkout / "task.yaml").symlink_to(tmp_path / "elsewhere")
    result = run_cli("init", "--yes", *options, cwd=checkout)
    assert (result.returncode, result.stderr.decode().splitlines()) == (
        4,
        ["Error: task.yaml is a symbolic link.", "  Remove the link, or give another FILE"],
    )
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "elsewhere").write_text("mine\n")
    assert run_cli("init", "--yes", *options, cwd=checkout).returncode == 4
    assert (tmp_path / "elsewhere").read_text() == "mine\n"


def test_init_without_a_terminal_does_not_prompt(run_cli, checkout):
    result = run_cli("init", cwd=checkout)
    assert (result.returncode, b"--yes" in result.stderr) == (2, True)
    assert list(checkout.glob("*.yaml")) == []


def test_invalid_manifest_is_not_written(run_cli, checkout):
    result = run_cli("init", "--yes", "--set", "vm.cpus=many", "--set", "repository.url=file:///etc", cwd=checkout)
    assert result.returncode == 9
    errors = result.stderr.decode()
    assert "manifest: repository.url: must be" in errors
    assert "manifest: vm.cpus: must be a whole number" in errors
    assert not (checkout / "task.yaml").exists()


@pytest.fixture(params=["outside", "without a remote"])
def without_repository(request, checkout, tmp_path):
    """A directory whose repository is unknown, and the expected reason."""
    if request.param == "outside":
        return tmp_path, f"{tmp_path} is not in a git checkout"
    git("remote", "remove", "origin", cwd=checkout)
    return checkout, f"{checkout} has no remote"


def test_missing_repository_error_suggests_options(run_cli, without_repository):
    directory, reason = without_repository
    result = run_cli("init", "--yes", cwd=directory)
    assert result.returncode == 2
    assert result.stderr.decode().splitlines() == [
        f"Error: {reason}, so the repository of the task is unknown.",
        "  Set it: add --set repository.url=URL --set repository.branch=BRANCH",
    ]
    partial = run_cli("init", "--yes", "--set", f"repository.url={URL}", cwd=directory)
    assert partial.stderr.decode().splitlines()[-1] == "  Set it: add --set repository.branch=BRANCH"
    settings = ("--set", f"repository.url={URL}", "--set", "repository.branch=main")
    assert run_cli("init", "--yes", *settings, cwd=directory).returncode == 0
    assert yaml.safe_load((directory / "task.yaml").read_text())["repository"] == {"url": URL, "branch": "main"}


def test_init_prompts_for_a_missing_repository(on_terminal, terminal, without_repository):
    on_terminal("init", cwd=without_repository[0])
    terminal.read_until(b"Repository:")


def test_missing_prompt_is_reported(run_cli, checkout):
    result = run_cli("init", "--yes", cwd=checkout)
    assert result.stderr.decode().splitlines() == [
        "Wrote task.yaml.",
        "  First describe the work in it: claude.prompt",
        "  Submit it and watch: sandbox task submit task.yaml --follow",
    ]
    result = run_cli("init", "--yes", "--force", "--set", "claude.prompt=Fix it.", cwd=checkout)
    assert b"claude.prompt" not in result.stderr
