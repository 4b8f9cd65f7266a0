"""Acceptance tests run the real server as a process and access it only through HTTP, WebSocket and the command line."""

from types import MappingProxyType

import pytest

from doubles.browser import open_chromium
from doubles.deployment import Deployment, make_repository, wait_until
from doubles.leftovers import find_leftovers
from doubles.shared_deployment import SharedDeployment

FILES = {"README.md": "# A repository\n\nHello.\n", "src/app.py": "print('hello')\n"}


_has_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.stash[_has_failed] = item.stash.get(_has_failed, False) or report.failed
    return report


@pytest.fixture
def deployment(tmp_path):
    """A deployment in which nothing has been started yet."""
    deploy = Deployment(tmp_path)
    yield deploy
    deploy.close()


@pytest.fixture
def without_command_fork_server(deployment):
    """Start each program of the deployment in a new interpreter, as users do, instead of forking."""
    deployment.forks = False


@pytest.fixture(scope="session")
def shared_deployments(tmp_path_factory):
    """Returns the shared deployment with the given runtime and server environment."""
    deployments = {}

    def deployment(runtime, environment):
        key = (runtime, *sorted(environment.items()))
        if key not in deployments:
            deployments[key] = SharedDeployment(lambda: tmp_path_factory.mktemp("shared"), runtime, environment)
        return deployments[key]

    yield deployment
    for each in deployments.values():
        each.close()


@pytest.fixture
def deploy(request, deployment, shared_deployments):
    """Starts a deployment with a repository, a running server, and a scripted model with the given turns.

    The deployment is shared with other tests in this process, unless the test has already prepared its own deployment.
    """
    shared = None

    def make(*turns, files=FILES, environment=MappingProxyType({}), **script):
        nonlocal shared
        if deployment.can_be_shared():
            shared = shared_deployments(deployment.runtime, environment)
            shared.attach(deployment, *turns, **script)
        else:
            deployment.start_git()
            deployment.start_model(*turns, **script)
            deployment.start_server(**environment)
        deployment.commit = make_repository(deployment.repositories / "repo.git", files)
        return deployment

    yield make
    if shared is not None:
        if request.node.stash[_has_failed]:
            shared.discard(deployment)
        else:
            shared.reclaim(deployment)
        deployment.processes, deployment.http = [], None


@pytest.fixture
def deploy_and_check_leftovers(request, deploy, deployment):
    """Like `deploy`; fails if leftovers of a task remain 5 seconds after the task has ended."""
    yield deploy
    try:
        wait_until(lambda: not find_leftovers(deployment.data_dir), 5, "the removal of the sandbox")
    except AssertionError:
        request.node.stash[_has_failed] = True
        raise


@pytest.fixture(scope="module")
def chromium():
    """One Chromium process per test module. Tests in this module cannot call `asyncio.run`."""
    with open_chromium() as chromium:
        yield chromium


@pytest.fixture
def browser(chromium):
    """A new headless browser."""
    with chromium.browser() as browser:
        yield browser
