"""Acceptance tests drive the real server as a process, by HTTP, WebSocket and command line only."""

import pytest

from doubles.live import World, make_repository

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
