"""A git server with one repository, and an attempt that is staged from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from doubles.workspace_fixture import House, Upstream
from sandbox.workspace.files import Entry, RootedFiles

MakeHouse = Callable[..., House]
Housed = Callable[[Upstream], House]


@pytest.fixture
def housed(tmp_path: Path) -> Iterator[Housed]:
    """Serves the repository to a house of the test's own."""
    with ExitStack() as stack:

        def make(upstream: Upstream) -> House:
            server = stack.enter_context(GitHttpServer(upstream.bare.parent).serving())
            house = House(upstream, server, tmp_path / "server-user.gitconfig", tmp_path)
            house.configure(f'[url "{server.url}"]\n\tinsteadOf = https://git.example/')
            return house

        yield make


@pytest.fixture
def make_house(housed: Housed, tmp_path: Path) -> MakeHouse:
    """Makes the house; the options go to `git init` of the repository that is served."""
    return lambda *options: housed(Upstream.empty(tmp_path / "upstream", *options))


@pytest.fixture(scope="session")
def first_commit(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """A repository with a first commit, to be copied: eight runs of git are spared."""
    upstream = Upstream.empty(tmp_path_factory.mktemp("first commit"))
    upstream.commit({"README.md": b"# Demo\n", "src/app.py": b"print(1)\n", "src/lib.py": b"x = 1\n" * 40})
    return upstream


@pytest.fixture
def house(housed: Housed, first_commit: Upstream, tmp_path: Path) -> House:
    """A house with a first commit."""
    return housed(first_commit.copy_to(tmp_path / "upstream"))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The directories of a workspace that were listed, in their order."""
    listed = []
    entries = RootedFiles.entries

    def note(self: RootedFiles, path: bytes) -> list[Entry]:
        listed.append(path)
        return entries(self, path)

    monkeypatch.setattr(RootedFiles, "entries", note)
    return listed
