"""A git server with one repository, and an attempt whose workspace is cloned from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from doubles.workspace_harness import UpstreamRepository, WorkspaceHarness
from sandbox.workspace.rooted_files import Entry, RootedFiles

MakeHarness = Callable[..., WorkspaceHarness]
ServeUpstream = Callable[[UpstreamRepository], WorkspaceHarness]


@pytest.fixture
def serve_upstream(tmp_path: Path) -> Iterator[ServeUpstream]:
    """Serve a repository; return a harness whose workspace is cloned from it."""
    with ExitStack() as stack:

        def make(upstream: UpstreamRepository) -> WorkspaceHarness:
            server = stack.enter_context(GitHttpServer(upstream.bare.parent).serving())
            harness = WorkspaceHarness(upstream, server, tmp_path / "server-user.gitconfig", tmp_path)
            harness.configure(f'[url "{server.url}"]\n\tinsteadOf = https://git.example/')
            return harness

        yield make


@pytest.fixture
def make_harness(serve_upstream: ServeUpstream, tmp_path: Path) -> MakeHarness:
    """Create a harness; the options are passed to `git init` of the served repository."""
    return lambda *options: serve_upstream(UpstreamRepository.empty(tmp_path / "upstream", *options))


@pytest.fixture(scope="session")
def repository_with_first_commit(tmp_path_factory: pytest.TempPathFactory) -> UpstreamRepository:
    """A repository with a first commit. Copying it saves eight runs of git."""
    upstream = UpstreamRepository.empty(tmp_path_factory.mktemp("first commit"))
    upstream.commit({"README.md": b"# Demo\n", "src/app.py": b"print(1)\n", "src/lib.py": b"x = 1\n" * 40})
    return upstream


@pytest.fixture
def harness(
    serve_upstream: ServeUpstream, repository_with_first_commit: UpstreamRepository, tmp_path: Path
) -> WorkspaceHarness:
    """A harness whose repository has a first commit."""
    return serve_upstream(repository_with_first_commit.copy_to(tmp_path / "upstream"))


@pytest.fixture
def listed_directories(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that records, in order, which directories of the workspace are read."""
    listed = []
    entries = RootedFiles.entries

    def record_entries(self: RootedFiles, path: bytes) -> list[Entry]:
        listed.append(path)
        return entries(self, path)

    monkeypatch.setattr(RootedFiles, "entries", record_entries)
    return listed
