"""What the agent is started with is written into its home, whatever an agent before it left there."""

import os
from pathlib import Path

import pytest

from doubles.ordinary_user import as_ordinary_user, ordinary_place
from sandbox.runner.steps.provision import write_home_files

FILES = {".sandbox/mcp.json": b"{}", ".claude.json": b"answers"}


@pytest.fixture
def home(tmp_path):
    made = tmp_path / "home"
    made.mkdir()
    return made


@pytest.fixture
def hosts(tmp_path):
    """A directory of the host's with a file that an agent would like to have written."""
    made = tmp_path / "host"
    made.mkdir()
    (made / "mcp.json").write_bytes(b"the host's")
    return made


def read(home):
    return {name: (home / name).read_bytes() for name in FILES}


def test_files_are_there_with_their_directories_and_nobody_elses_to_read(home):
    write_home_files(home, FILES)
    assert read(home) == FILES
    assert [(home / name).stat().st_mode & 0o777 for name in (".sandbox", ".claude.json")] == [0o700, 0o600]


def test_what_was_there_is_replaced_and_its_neighbours_stay(home):
    write_home_files(home, {".sandbox/mcp.json": b"old", ".sandbox/other": b"kept"})
    write_home_files(home, FILES)
    assert read(home) == FILES
    assert (home / ".sandbox/other").read_bytes() == b"kept"


def test_a_link_in_place_of_the_directory_leads_nowhere(home, hosts):
    (home / ".sandbox").symlink_to(hosts)
    write_home_files(home, FILES)
    assert (hosts / "mcp.json").read_bytes() == b"the host's"
    assert not (home / ".sandbox").is_symlink()
    assert read(home) == FILES


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_link_in_place_of_the_file_is_replaced_and_not_written_through(home, hosts, link):
    (home / ".sandbox").mkdir()
    link(hosts / "mcp.json", home / ".sandbox/mcp.json")
    write_home_files(home, FILES)
    assert (hosts / "mcp.json").read_bytes() == b"the host's"
    assert read(home) == FILES


def test_a_file_or_a_pipe_in_place_of_the_directory_is_replaced(home):
    os.mkfifo(home / ".sandbox")
    write_home_files(home, FILES)
    assert read(home) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_the_file_is_moved_aside(home, name):
    (home / name / "deep").mkdir(parents=True)
    (home / name / "deep" / "notes").write_bytes(b"the agent's")
    (home / name).chmod(0o500)
    write_home_files(home, FILES)
    assert read(home) == FILES
    [aside] = (home / name).parent.glob(f"{(home / name).name}.aside-*")
    assert (aside / "deep" / "notes").read_bytes() == b"the agent's"


async def write_as_user(place):
    home = Path(place) / "home"
    (home / ".sandbox").mkdir(parents=True)
    (home / ".sandbox").chmod(0o500)
    home.chmod(0)
    write_home_files(home, FILES)
    assert read(home) == FILES


def test_what_the_agent_locked_is_written_to_all_the_same():
    with ordinary_place() as place:
        as_ordinary_user(write_as_user, str(place))
