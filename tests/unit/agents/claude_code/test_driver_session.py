"""Whether an agent can go on is told by its home, in which it has written what it liked."""

import os
from pathlib import Path

import pytest

from doubles.ordinary_user import as_ordinary_user, ordinary_place
from sandbox.agents.claude_code.driver import PROJECTS_SCANNED_MAX, ClaudeCodeDriver

SESSION = "0e4cf8c5-3f5c-4e0d-9d0a-000000000001"


@pytest.fixture
def projects(tmp_path):
    """Where Claude Code keeps its sessions, in a home at `tmp_path / "home"`."""
    made = tmp_path / "home" / ".claude" / "projects"
    made.mkdir(parents=True)
    return made


def is_kept(tmp_path):
    return ClaudeCodeDriver(Path("/none")).has_session(tmp_path / "home", SESSION)


def keep(projects, *, name=f"{SESSION}.jsonl"):
    (projects / "-workspace").mkdir(parents=True)
    (projects / "-workspace" / name).write_text("{}\n")


def test_a_session_is_found_by_its_id(tmp_path, projects):
    keep(projects)
    assert is_kept(tmp_path)


async def look_as_user(place):
    home = Path(place) / "home"
    keep(home / ".claude" / "projects")
    (home / ".claude").chmod(0)
    home.chmod(0)
    assert is_kept(Path(place))


def test_a_home_that_the_agent_locked_has_its_session_all_the_same():
    with ordinary_place() as place:
        as_ordinary_user(look_as_user, str(place))


def test_another_session_is_none(tmp_path, projects):
    keep(projects, name="another.jsonl")
    assert not is_kept(tmp_path)


def test_a_home_without_sessions_has_none(tmp_path):
    (tmp_path / "home").mkdir()
    assert not is_kept(tmp_path)


@pytest.mark.parametrize("link", [".claude", ".claude/projects", ".claude/projects/-workspace"])
def test_no_link_on_the_way_is_followed(tmp_path, projects, link):
    keep(projects)
    place = tmp_path / "home" / link
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert not is_kept(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_is_no_session(tmp_path, projects, make):
    (projects / "-workspace").mkdir()
    make(projects / "-workspace" / f"{SESSION}.jsonl")
    assert not is_kept(tmp_path)


def test_a_file_among_the_directories_hides_no_session(tmp_path, projects):
    (projects / "a-file").touch()
    keep(projects)
    assert is_kept(tmp_path)


def test_of_a_flood_of_directories_only_some_are_looked_at(tmp_path, projects, monkeypatch):
    looked_at = []
    for number in range(PROJECTS_SCANNED_MAX + 50):
        (projects / f"flood-{number}").mkdir()
    really_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: looked_at.append(path) or really_open(path, *rest, **more)
    )
    assert not is_kept(tmp_path)
    assert len([path for path in looked_at if str(path).startswith("flood")]) == PROJECTS_SCANNED_MAX
