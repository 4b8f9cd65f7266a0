"""Acceptance tests drive the real server as a process, by HTTP, WebSocket and command line only."""

import pytest

from doubles.browser import open_browser
from doubles.live import World, make_repository, until
from doubles.traces import left_behind

README = "# A repository\n\nHello.\n"


@pytest.fixture
def empty_world(tmp_path):
    """A machine on which nothing has been started yet."""
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def world(empty_world):
    """Makes a machine whose model says these turns; gives it with a repository served and the server started."""

    def make(*turns, **script):
        empty_world.commit = make_repository(
            empty_world.repositories / "repo.git", {"README.md": README, "src/app.py": "print('hello')\n"}
        )
        empty_world.start_git()
        empty_world.start_model(*turns, **script)
        empty_world.start_server()
        return empty_world

    return make


@pytest.fixture
def watched(world, empty_world):
    """A world of whose tasks nothing is left on the machine, 5 seconds after they have ended."""
    yield world
    until(lambda: not left_behind(empty_world.data_dir), 5, "the sandbox to be gone without a trace")


@pytest.fixture
def browser():
    """A browser without a window."""
    with open_browser() as browser:
        yield browser
