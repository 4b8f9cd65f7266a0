"""The agent's files are written to its home, and replace the files of an earlier agent."""

import os
from pathlib import Path

import pytest

from doubles.ordinary_user import ordinary_user_directory, run_as_ordinary_user
from sandbox.runner.steps.provision import write_home_files

FILES = {".sandbox/mcp.json": b"{}", ".claude.json": b"answers"}


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def host_directory(tmp_path):
    """A host directory with a file that an agent must not overwrite."""
    path = tmp_path / "host"
    path.mkdir()
    (path / "mcp.json").write_bytes(b"the host's")
    return path


def read(home):
    return {name: (home / name).read_bytes() for name in FILES}


def test_files_and_directories_are_private(home):
    write_home_files(home, FILES)
    assert read(home) == FILES
    assert [(home / name).stat().st_mode & 0o777 for name in (".sandbox", ".claude.json")] == [0o700, 0o600]


def test_existing_files_with_the_same_names_are_replaced_and_other_files_are_preserved(home):
    write_home_files(home, {".sandbox/mcp.json": b"old", ".sandbox/other": b"kept"})
    write_home_files(home, FILES)
    assert read(home) == FILES
    assert (home / ".sandbox/other").read_bytes() == b"kept"


def test_symlink_in_place_of_the_directory_is_replaced(home, host_directory):
    (home / ".sandbox").symlink_to(host_directory)
    write_home_files(home, FILES)
    assert (host_directory / "mcp.json").read_bytes() == b"the host's"
    assert not (home / ".sandbox").is_symlink()
    assert read(home) == FILES


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_link_in_place_of_the_file_is_replaced_without_being_followed(home, host_directory, link):
    (home / ".sandbox").mkdir()
    link(host_directory / "mcp.json", home / ".sandbox/mcp.json")
    write_home_files(home, FILES)
    assert (host_directory / "mcp.json").read_bytes() == b"the host's"
    assert read(home) == FILES


@pytest.mark.parametrize(
    "name", ["../host/mcp.json", ".sandbox/../../host/mcp.json", "{}/mcp.json", "../host/mcp.json/x"]
)
def test_path_that_leaves_the_home_is_refused(home, host_directory, name):
    with pytest.raises(OSError, match="outside the home directory"):
        write_home_files(home, {name.format(host_directory): b"evil"})
    assert (host_directory / "mcp.json").read_bytes() == b"the host's"
    assert [path.name for path in host_directory.iterdir()] == ["mcp.json"]


def test_fifo_in_place_of_the_directory_is_replaced(home):
    os.mkfifo(home / ".sandbox")
    write_home_files(home, FILES)
    assert read(home) == FILES


@pytest.mark.parametrize("name", FILES)
def test_directory_in_place_of_the_file_is_moved_aside(home, name):
    (home / name / "deep").mkdir(parents=True)
    (home / name / "deep" / "notes").write_bytes(b"the agent's")
    (home / name).chmod(0o500)
    write_home_files(home, FILES)
    assert read(home) == FILES
    [aside] = (home / name).parent.glob(f"{(home / name).name}.aside-*")
    assert (aside / "deep" / "notes").read_bytes() == b"the agent's"


async def write_as_user(directory):
    home = Path(directory) / "home"
    (home / ".sandbox").mkdir(parents=True)
    (home / ".sandbox").chmod(0o500)
    home.chmod(0)
    write_home_files(home, FILES)
    assert read(home) == FILES


def test_files_are_written_to_a_read_only_home():
    with ordinary_user_directory() as place:
        run_as_ordinary_user(write_as_user, str(place))
