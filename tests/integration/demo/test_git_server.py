"""The demo's git server allows only clones and fetches."""

import asyncio

import httpx2
import pytest

from sandbox.demo.git_server import git_service
from sandbox.demo.walkthrough import FILES, git_environment, make_example_repository


@pytest.fixture
def repositories(tmp_path):
    directory = tmp_path / "repositories"
    make_example_repository(directory)
    (tmp_path / "secret").write_text("not for you")
    return directory


async def git(*arguments, cwd=None):
    process = await asyncio.create_subprocess_exec(
        *("git", *arguments),
        cwd=cwd,
        env=git_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, output.decode()


def serve(directory, scenario):
    async def run():
        async with git_service(directory) as service:
            return await scenario(service.url)

    return asyncio.run(run())


@pytest.mark.parametrize("depth", [(), ("--depth=1",)], ids=["whole", "shallow"])
def test_example_repository_can_be_cloned(repositories, tmp_path, depth):
    clone = tmp_path / "clone"
    code, output = serve(repositories, lambda url: git("clone", *depth, f"{url}/example.git", str(clone)))
    assert code == 0, output
    assert {path.name for path in clone.iterdir()} == {*FILES, ".git"}


def test_push_is_forbidden(repositories, tmp_path):
    async def push(url):
        await git("clone", f"{url}/example.git", str(tmp_path / "clone"))
        return await git("push", "origin", "HEAD:refs/heads/evil", cwd=tmp_path / "clone")

    code, output = serve(repositories, push)
    assert code != 0
    assert "403" in output


@pytest.mark.parametrize(
    "path",
    [
        "/example.git/git-receive-pack",
        "/example.git/info/refs?service=git-receive-pack",
        "/../secret",
        "/%2e%2e/secret",
        "/example.git/../../secret",
        "/example.git/config",
        "/",
    ],
)
def test_requests_other_than_fetch_are_forbidden(repositories, path):
    async def get(url):
        async with httpx2.AsyncClient(trust_env=False) as client:
            return await client.get(url + path)

    assert serve(repositories, get).status_code == 403


def test_missing_repository_is_not_found(repositories):
    code, output = serve(repositories, lambda url: git("ls-remote", f"{url}/missing.git"))
    assert code != 0
    assert "not found" in output


async def test_example_commit_is_reproducible(repositories, tmp_path):
    other = make_example_repository(tmp_path / "other")

    async def heads():
        return [(await git("rev-parse", "main", cwd=path))[1] for path in (repositories / "example.git", other)]

    first, second = await heads()
    assert first == second
    assert len(first.strip()) == 40
