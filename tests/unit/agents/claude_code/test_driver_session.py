"""A session can be resumed if its file is in the agent's home directory, which is untrusted."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from doubles.manifests import manifest
from doubles.ordinary_user import ordinary_user_directory, run_as_ordinary_user
from sandbox.agents.claude_code.driver import PROJECTS_SCANNED_MAX, ClaudeCodeDriver

SESSION = "0e4cf8c5-3f5c-4e0d-9d0a-000000000001"


@pytest.fixture
def projects(tmp_path):
    """Claude Code's session directory in the home directory `tmp_path / "home"`."""
    directory = tmp_path / "home" / ".claude" / "projects"
    directory.mkdir(parents=True)
    return directory


def read_session(tmp_path, bytes_max=100):
    return ClaudeCodeDriver(Path("/none")).read_session(tmp_path / "home", SESSION, bytes_max)


def has_session(tmp_path):
    return ClaudeCodeDriver(Path("/none")).has_session(tmp_path / "home", SESSION)


def write_session(projects, *, name=f"{SESSION}.jsonl"):
    (projects / "-workspace").mkdir(parents=True)
    (projects / "-workspace" / name).write_text("{}\n")


def test_session_is_found_by_id(tmp_path, projects):
    write_session(projects)
    assert has_session(tmp_path)


async def check_as_user(directory_path):
    home = Path(directory_path) / "home"
    write_session(home / ".claude" / "projects")
    (home / ".claude").chmod(0)
    home.chmod(0)
    assert has_session(Path(directory_path))


def test_session_in_a_locked_home_is_found():
    with ordinary_user_directory() as directory_path:
        run_as_ordinary_user(check_as_user, str(directory_path))


@pytest.mark.parametrize(("size", "is_read"), [(0, False), (1, True), (100, True), (101, False)])
def test_session_is_read_within_its_limit(tmp_path, projects, size, is_read):
    write_session(projects)
    (projects / "-workspace" / f"{SESSION}.jsonl").write_bytes(b"x" * size)
    assert read_session(tmp_path) == (b"x" * size if is_read else None)


def test_unreadable_session_is_made_readable(tmp_path, projects):
    write_session(projects)
    (projects / "-workspace" / f"{SESSION}.jsonl").chmod(0)
    assert read_session(tmp_path) == b"{}\n"


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "missing"])
def test_only_a_regular_file_is_read(tmp_path, projects, kind):
    file = projects / "-workspace" / f"{SESSION}.jsonl"
    file.parent.mkdir()
    (tmp_path / "secret").write_text("secret")
    match kind:
        case "link":
            file.symlink_to(tmp_path / "secret")
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    assert read_session(tmp_path) is None


def test_inherited_session_is_written_to_the_path_that_the_agent_reads():
    driver = ClaudeCodeDriver(Path("/none"))
    manifest_ = manifest()
    manifest_ = manifest_.replace(repository=replace(manifest_.repository, subpath="a/b.c"))
    spec = driver.prepare(manifest_, session_id=SESSION, gateway_key="k", secrets={}, session=b"{}\n")
    assert spec.home_files == {f".claude/projects/-workspace-a-b-c/{SESSION}.jsonl": b"{}\n"}
    assert spec.command.argv[-2:] == ("--resume", SESSION)
    assert spec.command.stdin == manifest_.agent.prompt.encode()


def test_session_with_a_different_id_is_not_found(tmp_path, projects):
    write_session(projects, name="another.jsonl")
    assert not has_session(tmp_path)


def test_home_without_sessions_has_no_session(tmp_path):
    (tmp_path / "home").mkdir()
    assert not has_session(tmp_path)


@pytest.mark.parametrize("link", [".claude", ".claude/projects", ".claude/projects/-workspace"])
def test_symlinks_in_the_path_are_not_followed(tmp_path, projects, link):
    write_session(projects)
    directory_path = tmp_path / "home" / link
    directory_path.rename(tmp_path / "elsewhere")
    directory_path.symlink_to(tmp_path / "elsewhere")
    assert not has_session(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_session_must_be_a_regular_file(tmp_path, projects, make):
    (projects / "-workspace").mkdir()
    make(projects / "-workspace" / f"{SESSION}.jsonl")
    assert not has_session(tmp_path)


def test_another_file_in_the_directory_does_not_hide_the_session(tmp_path, projects):
    (projects / "a-file").touch()
    write_session(projects)
    assert has_session(tmp_path)


def test_number_of_scanned_directories_is_bounded(tmp_path, projects, monkeypatch):
    opened = []
    for number in range(PROJECTS_SCANNED_MAX + 50):
        (projects / f"flood-{number}").mkdir()
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or real_open(path, *rest, **more))
    assert not has_session(tmp_path)
    assert len([path for path in opened if str(path).startswith("flood")]) == PROJECTS_SCANNED_MAX
