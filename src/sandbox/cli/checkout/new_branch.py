"""Commits a task's changes to a new branch in the checkout, without using the working tree, and pushes the branch.

No file from the patch is written to the working tree, so none can run as a hook or a filter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote, quote_plus

import click

from sandbox.cli.checkout.user_checkout import fail_with_git_output
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.terminal_text import escape_text
from sandbox.model.repository.url import public_repository_url, repository_location

if TYPE_CHECKING:
    from subprocess import CompletedProcess

    from sandbox.cli.checkout.user_checkout import Checkout

_CONFIG = ("i18n.commitEncoding=UTF-8", "core.splitIndex=false")
_FETCH_OPTIONS = (
    *("--no-tags", "--no-prune", "--no-write-fetch-head", "--no-recurse-submodules", "--no-auto-maintenance"),
    *("--quiet", "--refmap="),
)
"""Options with which a fetch changes nothing except the object database."""


@dataclass(frozen=True)
class NewBranch:
    """A branch to create in a checkout. remote: the remote to fetch missing commits from, and to push the branch to."""

    checkout: Checkout
    name: str
    remote: str | None = None

    def require_available(self) -> None:
        """Fail if the name is invalid or in use."""
        if self.checkout.git_output("check-ref-format", "--branch", self.name) != self.name:
            raise click.BadParameter(f"{self.name!r} is not a valid branch name", param_hint="'--branch'")
        checked_out = self.checkout.git_output("worktree", "list", "--porcelain") or ""
        if self._existing_commit() is not None or f"branch {self._ref}" in checked_out.splitlines():
            self._fail_because_it_exists("in this checkout")

    def commit(self, base: str, patch: Path, message: str) -> str:
        """Commit the patch on top of `base`, and create the branch at this commit; return the commit."""
        self._require_identity()
        with TemporaryDirectory() as directory:
            environment = {**os.environ, "GIT_INDEX_FILE": str(Path(directory) / "index")}
            apply = ("apply", "--cached", "--whitespace=nowarn", "--", str(patch.resolve()))
            for arguments in (("read-tree", base), apply):
                completed = self.checkout.run_git(*arguments, config=_CONFIG, environment=environment)
                if completed.returncode:
                    sentence = f"The patch does not apply to commit {base[:12]}, so no branch was created."
                    fail_with_git_output(sentence, completed.stderr)
            tree = self._output(self.checkout.run_git("write-tree", environment=environment))
        signing = ["-S"] if self.checkout.git_output("config", "--type=bool", "commit.gpgSign") == "true" else []
        committed = self.checkout.run_git(
            "commit-tree", *signing, "-p", base, tree, config=_CONFIG, stdin=message.encode()
        )
        commit = self._output(committed)
        created = self.checkout.run_git("update-ref", "-m", "sandbox task apply", self._ref, commit, "")
        if created.returncode:
            fail_with_git_output(f"git could not create the branch {self._shown}.", created.stderr)
        return commit

    def push(self, commit: str) -> tuple[str, str | None]:
        """Push the branch and make it track the new remote branch. Delete the branch if the push fails.

        A branch that exists on the remote is never changed. Return the remote and, if it is known, the URL that opens a
        pull request.
        """
        lease = f"--force-with-lease={self._ref}:"  # an empty value requires that the remote branch does not exist
        try:
            remote = self.remote or push_remote(self.checkout)
            pushed = self.checkout.run_git_with_user_config(
                "push", "--porcelain", "--set-upstream", lease, "--", remote, f"{self._ref}:{self._ref}"
            )
            if pushed.returncode:
                self._fail_push(remote, pushed)
        except BaseException:
            self.checkout.run_git("update-ref", "-d", self._ref, commit)
            raise
        url = self.checkout.git_output("remote", "get-url", "--push", remote)
        return remote, pull_request_url(url, self.name) if url else None

    def fetch_missing(self, base: str, repository: str, branch: str) -> None:
        """Fetch the commit `base` if the checkout does not have it. repository, branch: what the task cloned."""
        if self._has(base):
            return
        remote = self.remote or _remote_of(self.checkout, repository) or push_remote(self.checkout)
        sources = [base]
        if self._is_branch_ref(f"refs/heads/{branch}"):  # some servers send only branches, not single commits
            sources.append(f"refs/heads/{branch}")
        for source in sources:
            fetched = self.checkout.run_git("fetch", *_FETCH_OPTIONS, "--", remote, source)
            if self._has(base):
                return
        sentence = f"Neither this checkout nor its remote {escape_text(remote)} has the task's commit {base[:12]}."
        advice = f"Run the command in a checkout of {escape_text(public_repository_url(repository))}, or add --remote."
        fail_with_git_output(sentence, fetched.stderr, advice)

    @property
    def _ref(self) -> str:
        return f"refs/heads/{self.name}"

    @property
    def _shown(self) -> str:
        return escape_text(self.name)

    def _existing_commit(self) -> str | None:
        return self.checkout.git_output("rev-parse", "--verify", "--quiet", "--end-of-options", self._ref)

    def _is_branch_ref(self, ref: str) -> bool:
        """Return whether the reference is valid. A refspec such as `main:refs/heads/main` would move a branch."""
        return "\0" not in ref and not self.checkout.run_git("check-ref-format", ref).returncode

    def _has(self, commit: str) -> bool:
        return not self.checkout.run_git("cat-file", "-e", f"{commit}^{{commit}}").returncode

    def _require_identity(self) -> None:
        completed = self.checkout.run_git("var", "GIT_COMMITTER_IDENT")
        if completed.returncode:
            advice = "Set it: git config user.name NAME; git config user.email EMAIL"
            fail_with_git_output(
                "The commit would have no author: git is not configured with a name and email.", b"", advice
            )

    def _output(self, completed: CompletedProcess[bytes]) -> str:
        if completed.returncode:
            fail_with_git_output("git could not create the commit.", completed.stderr)
        return completed.stdout.decode().strip()

    def _fail_push(self, remote: str, pushed: CompletedProcess[bytes]) -> NoReturn:
        if b"(stale info)" in pushed.stdout:
            self._fail_because_it_exists(f"on {escape_text(remote)}")
        sentence = f"git could not push to {escape_text(remote)}, so no branch was created."
        reasons = [line[1:].strip() for line in pushed.stdout.splitlines() if line.startswith(b"!")]
        fail_with_git_output(
            sentence, pushed.stderr + b"\n".join(reasons), "Create the branch only here: leave out --push"
        )

    def _fail_because_it_exists(self, place: str) -> NoReturn:
        message = f"Error: The branch {self._shown} already exists {place}, so nothing was changed."
        fail(f"{message}\n  Choose another name: --branch {self._shown}-2", ExitCode.CONFLICT)


def push_remote(checkout: Checkout) -> str:
    """Return the remote for pushing new branches: `remote.pushDefault`, otherwise `origin`, otherwise the only one."""
    names = (checkout.git_output("remote") or "").splitlines()
    for name in (checkout.git_output("config", "--get", "remote.pushDefault"), "origin"):
        if name in names:
            return str(name)
    if len(names) != 1:
        problem = f"several remotes: {', '.join(names)}" if names else "no remote"
        advice = "Choose one: add --remote NAME" if names else "Add one: git remote add origin URL"
        fail(f"Error: This checkout has {escape_text(problem)}.\n  {advice}", ExitCode.USAGE)
    return names[0]


def _remote_of(checkout: Checkout, repository: str) -> str | None:
    """Return the remote for this repository, even if the remote's URL uses a different protocol."""
    location = repository_location(repository)
    for name in (checkout.git_output("remote") or "").splitlines():
        url = checkout.git_output("remote", "get-url", name)
        if url and repository_location(url) == location:
            return name
    return None


_SSH_HOSTS = {"ssh.github.com:443": "github.com", "altssh.gitlab.com:443": "gitlab.com"}
"""Maps SSH endpoints on the HTTPS port to the hosts of their web pages."""


def pull_request_url(remote_url: str, branch: str) -> str | None:
    """Return the URL that opens a pull request for a branch on GitHub or GitLab; None for any other host."""
    host, _, path = repository_location(remote_url).partition("/")
    if not remote_url.startswith("http"):
        host = _SSH_HOSTS.get(host, host.partition(":")[0])
    page = f"https://{host}/{quote(path, safe='/%')}"
    if path and host.startswith("github."):
        return f"{page}/pull/new/{quote(branch)}"
    if path and host.startswith("gitlab."):
        return f"{page}/-/merge_requests/new?merge_request%5Bsource_branch%5D={quote_plus(branch)}"
    return None
