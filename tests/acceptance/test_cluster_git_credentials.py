"""Clones on workers whose host has no git credentials: the server's git configuration has them."""

import asyncio
import base64
import json
import os
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from doubles.cluster_deployment import ClusterDeployment
from doubles.deployment import make_repository, reply_turn
from doubles.git_http_server import GitHttpServer
from doubles.remote_deployment import closing_deployment
from doubles.runner_processes import find_runner

PASSWORD, OTHER_PASSWORD = "password-of-a-0123456789abcdef", "password-of-b-0123456789abcdef"
SEARCH_CONTROL_VALUE = "planted-0123456789abcdef"

HELPER = """#!{python} -ISs
# A credential helper with the passwords of two servers. It has none for programs that a worker has started.
import json, os, sys
from pathlib import Path

query = dict(line.rstrip("\\n").partition("=")[::2] for line in sys.stdin)
pid, ancestors = os.getppid(), []
while pid > 1:
    ancestors += Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\\0")
    pid = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
is_on_host = not {{"worker", "sandbox.bootstrap.runner"}}.isdisjoint(ancestors)
with open({log!r}, "a") as log:
    print(json.dumps([sys.argv[1], query["host"], "host" if is_on_host else "server"]), file=log)
if sys.argv[1] == "get" and not is_on_host:
    print("username=me\\npassword=" + {passwords!r}[query["host"]])
"""


class WatchedGitServer(GitHttpServer):
    """Calls `on_authorized` before it answers the first request with the right password."""

    def __init__(self, root):
        super().__init__(root)
        self.on_authorized, self.authorized_count = None, 0

    async def _respond(self, request):
        if self.credentials is not None and self._is_authorized(request):
            self.authorized_count += 1
            callback, self.on_authorized = self.on_authorized, None
            if callback is not None:
                await asyncio.to_thread(callback)
        return await super()._respond(request)


class CredentialsDeployment(ClusterDeployment):
    """Two private git servers, `https://a.example/` and `https://b.example/`. Only the server has their passwords."""

    def start_host(self):
        self.stack = []
        self.log, self.secrets = self.directory / "lookups", self.directory / "secrets"
        self.log.touch()
        self.secrets.mkdir()
        self.git_servers = [self.start_git_server(name) for name in "ab"]
        passwords = dict(zip(map(host_of, self.git_servers), (PASSWORD, OTHER_PASSWORD), strict=True))
        for git_server, password in zip(self.git_servers, passwords.values(), strict=True):
            git_server.credentials = f"me:{password}"
        helper = self.secrets / "helper"
        helper.write_text(HELPER.format(python=sys.executable, log=str(self.log), passwords=passwords))
        helper.chmod(0o700)
        with (self.home / ".gitconfig").open("a") as config:
            config.write(f"[credential]\n\thelper = {helper}\n")
            for name, git_server in zip("ab", self.git_servers, strict=True):
                config.write(f'[url "{git_server.url}"]\n\tinsteadOf = https://{name}.example/\n')

    def start_git_server(self, name):
        root = self.directory / f"git-{name}"
        root.mkdir()
        make_repository(root / "repo.git", {"README.md": f"Repository {name}.\n"})
        serving = WatchedGitServer(root).serving()
        self.stack.append(serving)
        return serving.__enter__()

    def close(self):
        super().close()
        for serving in self.stack:
            serving.__exit__(None, None, None)

    def submit_clone(self, task_id, name):
        return self.submit(task_id, repository={"url": f"https://{name}.example/repo.git"})

    def lookups(self):
        """Return the lookups as (action, host, place)."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]

    def search(self, value, task_id):
        """Return the kinds of places on the host, and in the server's data directory, that contain the value."""
        forms = [value.encode(), base64.b64encode(f"me:{value}".encode()), value.encode().hex().encode()]
        runner, found = find_runner(self.host_data_dir, task_id), set()
        for pid in () if runner is None else descendants(self.worker_pid()):
            proc = Path("/proc", str(pid))
            for kind in ("cmdline", "environ"):
                found |= {kind} if contains(proc / kind, forms) else set()
            for descriptor in list_directory(proc / "fd"):
                found |= {"descriptors"} if contains(descriptor, forms) else set()
        # The file system of the attempt is mounted only for its runner.
        roots = [self.data_dir, self.home, *([Path(f"/proc/{runner}/root{self.host_data_dir}")] if runner else [])]
        for path in (path for root in roots for path in root.rglob("*") if "agent" not in path.parts):
            if contains(path, forms):
                found.add("journal" if path.parent.name == "journal" else "files")
        return found


def host_of(git_server):
    return urlsplit(git_server.url).netloc


def descendants(pid):
    """Return a process and all its descendants."""
    children = [
        int(child)
        for task in list_directory(Path(f"/proc/{pid}/task"))
        for child in (task / "children").read_text().split()
    ]
    return [pid, *(descendant for child in children for descendant in descendants(child))]


def credential_socket_holders(worker, runner):
    """Yield the kind of each program that has the runner's end of the socket pair for credentials."""
    [option] = [word for word in arguments(runner) if word.startswith("--credentials-fd=")]
    socket = Path(f"/proc/{runner}/fd/{option.partition('=')[2]}").readlink()
    for pid in descendants(worker):
        if any(descriptor.readlink() == socket for descriptor in list_directory(Path(f"/proc/{pid}/fd"))):
            yield next((word for word in ("sandbox.bootstrap.runner", "worker") if word in arguments(pid)), "another")


def arguments(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def list_directory(path):
    try:
        return list(path.iterdir())
    except OSError:
        return []


def contains(path, forms):
    """Return whether a regular file contains one of the values; the holes of a sparse file are skipped."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # /proc
                return contains_any(file.read(), forms)
            return any(contains_any(data, forms) for data in segments(file))
    except OSError:
        return False


def contains_any(data, forms):
    return any(form in data for form in forms)


def segments(file):
    end = 0
    while True:
        try:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        yield os.pread(file.fileno(), end - begin, begin)


@pytest.fixture
def deployment(tmp_path):
    with closing_deployment(CredentialsDeployment(tmp_path)) as start:
        yield start(*[reply_turn()] * 8)


@pytest.mark.timeout(240)
def test_private_repository_is_cloned_and_its_password_is_never_stored_on_the_host(deployment):
    first, _ = deployment.git_servers
    during, holders = {}, []

    def search():
        runner = find_runner(deployment.host_data_dir, "task-1")
        [disk] = Path(f"/proc/{runner}/root{deployment.host_data_dir}").glob("tasks/task-1/attempts/*/disk")
        (disk / "planted").write_text(SEARCH_CONTROL_VALUE)
        for value in (PASSWORD, SEARCH_CONTROL_VALUE, "SANDBOX_LOG_LEVEL", "--credentials-fd", "Do it."):
            during[value] = deployment.search(value, "task-1")
        holders.extend(credential_socket_holders(deployment.worker_pid(), runner))

    first.on_authorized = search
    deployment.submit_clone("task-1", "a")
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()

    host = host_of(first)
    assert deployment.lookups() == [("get", host, "host"), ("get", host, "server")]
    assert set(holders) == {"worker", "sandbox.bootstrap.runner"}  # git does not have it
    assert during.pop(PASSWORD) == set()
    # Control: the search finds the values that are in these places.
    assert "environ" in during["SANDBOX_LOG_LEVEL"]
    assert "cmdline" in during["--credentials-fd"]
    assert {"journal", "descriptors"} <= during["Do it."]
    assert "files" in during[SEARCH_CONTROL_VALUE]
    assert deployment.search(PASSWORD, "task-1") == set()
    planted = deployment.host_data_dir / "planted"
    planted.write_bytes(b"x" + base64.b64encode(f"me:{PASSWORD}".encode()))
    assert deployment.search(PASSWORD, "task-1") == {"files"}


@pytest.mark.timeout(240)
def test_public_repository_is_cloned_without_a_lookup(deployment):
    first, _ = deployment.git_servers
    first.credentials = None
    deployment.submit_clone("task-1", "a")
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert deployment.lookups() == []


@pytest.mark.timeout(240)
def test_task_of_one_repository_cannot_get_the_password_of_another(deployment):
    """The first server redirects git to the second one, which asks for its password."""
    first, second = deployment.git_servers
    first.redirect = second.url
    deployment.submit_clone("task-1", "a")
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "clone_failed"), deployment.diagnostics()
    assert second.requests
    assert second.authorized_count == 0
    assert deployment.lookups() == []

    deployment.submit_clone("task-2", "b")
    assert deployment.wait("task-2")["state"] == "completed", deployment.diagnostics("task-2")
    assert second.authorized_count > 0


@pytest.mark.timeout(240)
def test_failure_states_that_the_server_has_no_credentials(deployment):
    first, _ = deployment.git_servers
    (deployment.secrets / "helper").write_text("#!/bin/sh\n")
    deployment.submit_clone("task-1", "a")
    failure = deployment.wait()["error"]
    assert failure["code"] == "clone_failed"
    assert failure["message"].endswith(f"The server has no credentials for http://{host_of(first)}.")
