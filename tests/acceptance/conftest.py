"""Acceptance tests drive the real server as a process, by HTTP, WebSocket and command line only."""

from types import MappingProxyType

import pytest

from doubles.browser import open_chromium
from doubles.leftovers import left_behind
from doubles.live_server import World, make_repository, until
from doubles.shared_machine import StandingMachine

FILES = {"README.md": "# A repository\n\nHello.\n", "src/app.py": "print('hello')\n"}


_has_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.stash[_has_failed] = item.stash.get(_has_failed, False) or report.failed
    return report


@pytest.fixture
def empty_world(tmp_path):
    """A machine on which nothing has been started yet."""
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def true_starts(empty_world):
    """What the test's machine starts begins as users begin it: an interpreter, and all imports."""
    empty_world.forks = False


@pytest.fixture(scope="session")
def standing_machines(tmp_path_factory):
    """Gives the one whose sandboxes are of this runtime, and whose server has these variables."""
    machines = {}

    def machine(runtime, environment):
        key = (runtime, *sorted(environment.items()))
        if key not in machines:
            machines[key] = StandingMachine(lambda: tmp_path_factory.mktemp("standing"), runtime, environment)
        return machines[key]

    yield machine
    for each in machines.values():
        each.close()


@pytest.fixture
def world(request, empty_world, standing_machines):
    """Makes a machine whose model says these turns; gives it with a repository served and the server started.

    One that other tests of this process have had too, unless this one has laid something ready before the start.
    """
    lender = None

    def make(*turns, files=FILES, environment=MappingProxyType({}), **script):
        nonlocal lender
        if empty_world.is_new():
            lender = standing_machines(empty_world.runtime, environment)
            lender.lend(empty_world, *turns, **script)
        else:
            empty_world.start_git()
            empty_world.start_model(*turns, **script)
            empty_world.start_server(**environment)
        empty_world.commit = make_repository(empty_world.repositories / "repo.git", files)
        return empty_world

    yield make
    if lender is not None:
        if request.node.stash[_has_failed]:
            lender.give_up(empty_world)
        else:
            lender.take_back(empty_world)
        empty_world.processes, empty_world.http = [], None


@pytest.fixture
def watched(request, world, empty_world):
    """A world of whose tasks nothing is left on the machine, 5 seconds after they have ended."""
    yield world
    try:
        until(lambda: not left_behind(empty_world.data_dir), 5, "the sandbox to be gone without a trace")
    except AssertionError:
        request.node.stash[_has_failed] = True
        raise


@pytest.fixture(scope="module")
def chromium():
    """One for the tests of a file, which may not use `asyncio.run` beside it."""
    with open_chromium() as chromium:
        yield chromium


@pytest.fixture
def browser(chromium):
    """A browser without a window, that no other test has used."""
    with chromium.browser() as browser:
        yield browser
