"""A served repository, and an attempt whose workspace is cloned from it."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doubles.git_http_server import GitHttpServer
from doubles.sandbox_lifecycle import new_attempt_id
from sandbox.gateway.egress.policy import is_dialable
from sandbox.interfaces.runtime import ConfinementSpec
from sandbox.interfaces.workspace import DetectSecret, PatchResult
from sandbox.model.manifest.schema import Repository
from sandbox.runtimes import sandbox_filesystem
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.workspace.clone.socks_proxy import DialPolicy
from sandbox.workspace.no_confinement import NoConfinement
from sandbox.workspace.workspaces import GitWorkspaces

PUBLIC_URL = "https://git.example/demo.git"
IDENTITY = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def run_git(*arguments: str, directory: Path, stdin: bytes = b"", **variables: str) -> str:
    """Run git with an empty configuration."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C.UTF-8",
        **IDENTITY,
        **variables,
    }
    command = ["git", "-c", "protocol.file.allow=always", "-c", "core.autocrlf=false", *arguments]
    result = subprocess.run(
        command, cwd=directory, env=environment, input=stdin, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout.decode(errors="surrogateescape").strip()


def snapshot(root: Path) -> dict[str, tuple[str, bytes]]:
    """Return the kind and content of every file and link, without the top-level `.git`."""
    found = {}
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if relative.parts[0] != ".git" and (path.is_symlink() or path.is_file()):
            found[str(relative)] = _kind_and_content(path)
    return found


def _kind_and_content(path: Path) -> tuple[str, bytes]:
    if path.is_symlink():
        return "link", os.fsencode(path.readlink())
    return ("executable" if path.stat().st_mode & 0o100 else "file"), path.read_bytes()


class UpstreamRepository:
    """The upstream repository, and a work tree for committing to it."""

    def __init__(self, root: Path) -> None:
        self.work = root / "work"
        self.bare = root / "served" / "demo.git"

    @classmethod
    def empty(cls, root: Path, *options: str) -> "UpstreamRepository":
        """Create an empty repository; the options are passed to `git init`."""
        upstream = cls(root)
        upstream.work.mkdir(parents=True)
        upstream.bare.parent.mkdir()
        run_git("init", "--quiet", "--initial-branch=main", *options, ".", directory=upstream.work)
        run_git("init", "--quiet", "--bare", *options, str(upstream.bare), directory=root)
        return upstream

    def copy_to(self, root: Path) -> "UpstreamRepository":
        """Copy both repositories to `root`."""
        shutil.copytree(self.work.parent, root, symlinks=True)
        return UpstreamRepository(root)

    def commit(self, files: dict[str, bytes | None], message: str = "Work", branch: str = "main") -> str:
        """Write files (None deletes a file), commit everything and push."""
        for name, content in files.items():
            path = self.work / name
            if content is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return self.commit_all(message, branch)

    def commit_all(self, message: str = "Work", branch: str = "main") -> str:
        """Commit the work tree and push."""
        run_git("add", "--all", "--force", directory=self.work)
        run_git("commit", "--quiet", "--allow-empty", "--message", message, directory=self.work)
        return self.push(branch)

    def push(self, branch: str = "main") -> str:
        """Push HEAD; return its commit."""
        run_git("push", "--quiet", "--force", str(self.bare), f"HEAD:refs/heads/{branch}", directory=self.work)
        return run_git("rev-parse", "HEAD", directory=self.work)


def descendant_names(pid: int) -> list[bytes]:
    """Return the names of all descendant processes."""
    names: list[bytes] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    names += [Path(f"/proc/{child}/comm").read_bytes().strip(), *descendant_names(int(child))]
    return names


@dataclass
class WorkspaceHarness:
    """A server, an attempt directory, and operations on the attempt's workspace."""

    upstream: UpstreamRepository
    server: GitHttpServer
    config: Path
    root: Path
    variables: dict[str, str] | None = None
    base_commit: str = ""
    follow_redirects: bool = True
    confined: bool = True
    disk_bytes: int = 40 * 1024**3
    memory_bytes: int = 8 * 1024**3
    credentials_server: Any = None

    @asynccontextmanager
    async def confine(self, directories, read_only_directories):
        """Confine commands as a runner does, with a sandbox's kernel uid and control group."""
        if not self.confined:
            yield NoConfinement()
            return
        runtime = BubblewrapRuntime(self.root)
        handle = runtime.prepare(new_attempt_id())
        try:
            spec = ConfinementSpec(2, self.memory_bytes, 512, directories, read_only_directories)
            async with runtime.confine(handle, spec) as confinement:
                yield confinement
        finally:
            await runtime.destroy(handle, self.attempt_dir / "nothing")

    @property
    def attempt_dir(self) -> Path:
        return self.root / "attempt"

    @property
    def workspace(self) -> Path:
        return self.attempt_dir / "disk" / "workspace"

    @property
    def environment(self) -> dict[str, str]:
        if self.variables is not None:
            return self.variables
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        return {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_CONFIG_GLOBAL": str(self.config)}

    @property
    def workspaces(self) -> GitWorkspaces:
        find = None if self.credentials_server is None else self.credentials_server.find
        return GitWorkspaces(self.environment, DialPolicy(is_dialable, self.follow_redirects), find)

    def configure(self, text: str) -> None:
        """Add text to the git configuration of the server's user."""
        with self.config.open("a") as file:
            file.write(text + "\n")

    def stage(
        self, url: str = PUBLIC_URL, branch: str = "main", patches: Sequence[Path] = (), **repository_fields: Any
    ) -> str:
        """Clone the repository into the attempt's workspace."""
        repository = Repository(url=url, branch=branch, **repository_fields)
        base_commit = asyncio.run(
            self.workspaces.stage(repository, self.attempt_dir, self.confine, self.disk_bytes, patches)
        )
        if self.confined and os.geteuid() == 0:
            sandbox_filesystem.restore_ownership(str(self.workspace))
        return base_commit

    def patch(self, base_commit: str) -> bytes:
        """Return the patch of the current workspace."""
        patch_text, reason = self.patch_and_reason(base_commit)
        assert reason is None
        return patch_text

    def patch_and_reason(self, base_commit: str) -> tuple[bytes, str | None]:
        """Return the patch, and the reason if it is incomplete."""
        patch_text, result = self.patch_and_result(base_commit, lambda _: False)
        return patch_text, result.incomplete_reason

    def patch_and_result(self, base_commit: str, detect_secret: DetectSecret) -> tuple[bytes, PatchResult]:
        """Return the patch, and the result of creating it."""
        target = self.root / "task.patch"
        creation = self.workspaces.write_patch(self.attempt_dir, base_commit, target, self.confine, detect_secret)
        result = asyncio.run(creation)
        return target.read_bytes(), result

    def apply(self, base_commit: str, patch: bytes) -> Path:
        """Apply the patch in a new clone; return the clone."""
        clone = self.root / "applied"
        shutil.rmtree(clone, ignore_errors=True)
        run_git("clone", "--quiet", "--no-checkout", str(self.upstream.bare), str(clone), directory=self.root)
        run_git("checkout", "--quiet", "--detach", base_commit, directory=clone)
        if patch:
            run_git("apply", "--index", "--whitespace=nowarn", "-", directory=clone, stdin=patch)
        return clone

    def verify_patch(self, base_commit: str) -> bytes:
        """Create the patch. Check that applying it reproduces the tree in the index and in the work tree."""
        patch = self.patch(base_commit)
        clone = self.apply(base_commit, patch)
        assert snapshot(clone) == snapshot(self.workspace)
        assert run_git("diff", "--name-only", directory=clone) == ""
        return patch
