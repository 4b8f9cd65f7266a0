"""A git server with one repository, and an attempt that is staged from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from doubles.workspace_house import House, Upstream
from sandbox.workspace.files import Entry, Files

MakeHouse = Callable[..., House]


@pytest.fixture
def make_house(tmp_path: Path) -> Iterator[MakeHouse]:
    """Makes the house; the options go to `git init` of the repository that is served."""
    with ExitStack() as stack:

        def make(*options: str) -> House:
            upstream = Upstream(tmp_path / "upstream", *options)
            server = stack.enter_context(GitHttpServer(upstream.bare.parent).serving())
            house = House(upstream, server, tmp_path / "server-user.gitconfig", tmp_path)
            house.configure(f'[url "{server.url}"]\n\tinsteadOf = https://git.example/')
            return house

        yield make


@pytest.fixture
def house(make_house: MakeHouse) -> House:
    """A house with a first commit."""
    made = make_house()
    made.upstream.commit({"README.md": b"# Demo\n", "src/app.py": b"print(1)\n", "src/lib.py": b"x = 1\n" * 40})
    return made


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The directories of a workspace that were listed, in their order."""
    listed = []
    entries = Files.entries

    def note(self: Files, path: bytes) -> list[Entry]:
        listed.append(path)
        return entries(self, path)

    monkeypatch.setattr(Files, "entries", note)
    return listed
