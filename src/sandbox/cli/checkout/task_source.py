"""What a task needs to start from the current checkout: remote, branch, commit, and a patch with the local changes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

import click

from sandbox.cli.checkout.patch_application import list_changed_files
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text, terminal_width, wrap_text
from sandbox.cli.output.formatting import pluralize
from sandbox.model.display_text import format_size
from sandbox.model.manifest.field_formats import GIT_PATCH_BYTES_MAX, REPOSITORY_URL

if TYPE_CHECKING:
    from sandbox.cli.checkout.user_checkout import Checkout
    from sandbox.cli.patches import ChangedFile


@dataclass(frozen=True)
class CloneSource:
    """What a task clones to start from a checkout: a commit in a remote repository.

    commit: the latest commit of this checkout's history that is known to be in the remote's branch.
    unpushed: number of later commits in this checkout's history.
    has_credentials: the remote's URL contains credentials, which were removed from `url`.
    """

    remote: str
    url: str
    branch: str
    commit: str
    unpushed: int
    has_credentials: bool


def find_clone_source(checkout: Checkout, remote: str | None) -> CloneSource:
    """Determine the source without network access. Exits with an error if local information is insufficient.

    remote: the remote's name; None uses the current branch's upstream, otherwise `origin`, otherwise the only remote.
    """
    head = checkout.current_commit()
    if head is None:
        _fail("This checkout has no commit yet.", "Commit and push first")
    name = remote or _choose_remote(checkout)
    url, has_credentials = _remote_url(checkout, name)
    branch, commit = _find_pushed_base(checkout, name, head)
    unpushed = int(checkout.git_output("rev-list", "--count", f"{commit}..{head}") or 0)
    return CloneSource(name, url, branch, commit, unpushed, has_credentials)


def _choose_remote(checkout: Checkout) -> str:
    names = (checkout.git_output("remote") or "").splitlines()
    branch = checkout.current_branch()
    upstream_remote = checkout.git_output("config", "--get", f"branch.{branch}.remote") if branch else None
    for name in (upstream_remote, "origin"):
        if name in names:
            return str(name)
    if not names:
        _fail("This checkout has no remote to clone from.", "Add one: git remote add origin URL")
    if len(names) > 1:
        _fail(f"This checkout has several remotes: {', '.join(names)}.", "Choose one: add --remote NAME")
    return names[0]


def _remote_url(checkout: Checkout, remote: str) -> tuple[str, bool]:
    """Return the URL as configured, not as git rewrites it, because the server has different git settings.

    If that URL is invalid, return the URL that git resolves.
    """
    urls = checkout.git_output("config", "--get-all", f"remote.{remote}.url") or ""
    written = urls.partition("\n")[0]  # git fetches from the first URL, and pushes to all
    if not written:
        _fail(f"There is no remote {remote}.", "List them: git remote -v")
    addresses = [_strip_credentials(one) for one in (written, checkout.git_output("remote", "get-url", remote) or "")]
    valid_url = next((one for one in addresses if REPOSITORY_URL.find_error(one[0]) is None), None)
    if valid_url is None:
        url_error = REPOSITORY_URL.find_error(addresses[0][0])
        _fail(f"The URL of {remote} {url_error}.", f"Fix it: git remote set-url {shlex.quote(remote)} URL")
    return valid_url


def _strip_credentials(address: str) -> tuple[str, bool]:
    scheme, separator, rest = address.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if scheme not in {"http", "https"} or not at:
        return address, False
    return f"{scheme}{separator}{host}{rest[len(user + at + host) :]}", True


def _find_pushed_base(checkout: Checkout, remote: str, head: str) -> tuple[str, str]:
    """Return the remote branch to clone, and its merge base with `head`."""
    prefix = f"refs/remotes/{remote}/"
    upstream_branch = _upstream_branch(checkout, remote)
    containing = checkout.git_output("for-each-ref", f"--contains={head}", "--format=%(refname)", prefix) or ""
    containing_refs = [ref for ref in containing.splitlines() if ref != f"{prefix}HEAD"]
    default_branch_ref = checkout.git_output("symbolic-ref", "--quiet", f"{prefix}HEAD")
    upstream_ref = f"{prefix}{upstream_branch}" if upstream_branch else None
    # A branch that was started from `origin/main` and pushed without `-u` still has `origin/main` as its upstream.
    own_ref = f"{prefix}{checkout.current_branch()}"
    if (
        upstream_ref
        and upstream_ref not in containing_refs
        and own_ref not in containing_refs
        and checkout.git_output("rev-parse", "--verify", "--quiet", upstream_ref)
    ):
        containing_refs = [upstream_ref]
    preferred = [ref for ref in (upstream_ref, own_ref, default_branch_ref) if ref in containing_refs]
    bases = (
        (ref, checkout.git_output("merge-base", head, ref))
        for ref in (*preferred, *containing_refs, default_branch_ref)
        if ref
    )
    base = next(((ref.removeprefix(prefix), commit) for ref, commit in bases if commit), None)
    if base is None:
        push = shlex.join(["git", "push", "-u", remote, checkout.current_branch() or "HEAD"])
        _fail(f"No commit of this checkout is on {remote}.", f"Push it first: {push}")
    return base


def _upstream_branch(checkout: Checkout, remote: str) -> str | None:
    """Return the current branch's upstream on this remote; if there is none, return the current branch's name."""
    branch = checkout.current_branch()
    if branch and checkout.git_output("config", "--get", f"branch.{branch}.remote") == remote:
        merged = checkout.git_output("config", "--get", f"branch.{branch}.merge")
        return merged.removeprefix("refs/heads/") if merged else branch
    return branch


def _fail(sentence: str, advice: str) -> NoReturn:
    fail(f"Error: {escape_text(sentence)}\n  {escape_text(advice)}", ExitCode.USAGE)


LISTED_FILES_MAX = 10
CHANGED_BYTES_MAX = 256 * 1024**2
"""Maximum total size of the changed files.

It exceeds the patch's limit, because the change to a large file may be small.
"""

_TOO_LARGE_HINT = "  Commit and push it, or exclude large files: .gitignore"


def create_local_patch(checkout: Checkout, commit: str) -> bytes:
    """Create a patch with the changes between `commit` and the working tree, and print the names of the changed files.

    The patch is empty if nothing has changed. Ignored files are excluded. Exits with an error if the patch is too large
    to send.
    """
    sizes = checkout.changed_file_sizes()
    _reject_nested_repositories(checkout, sizes)
    _reject_oversized(sizes)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "patch"
        checkout.write_diff(commit, path, Path(directory))
        if path.stat().st_size > GIT_PATCH_BYTES_MAX:
            actual_size, size_limit = format_size(path.stat().st_size), format_size(GIT_PATCH_BYTES_MAX)
            fail(
                f"Error: The patch with the local changes is {actual_size}; the limit is {size_limit}.\n"
                f"{_TOO_LARGE_HINT}",
                ExitCode.CONFLICT,
            )
        patch = path.read_bytes()
        if patch:
            _print_files(list_changed_files(checkout, path))
        return patch


def _reject_nested_repositories(checkout: Checkout, paths: Iterable[str]) -> None:
    """Fail if there are changes in nested repositories, which a patch of this repository cannot contain."""
    if submodules := checkout.changed_submodules():
        message = f"Error: The submodule {escape_name(submodules[0])} has uncommitted changes, which cannot be sent."
        fail(f"{message}\n  Commit and push them there, or stash them there: git stash -u", ExitCode.CONFLICT)
    if nested := sorted(path for path in paths if path.endswith("/")):
        message = f"Error: {escape_name(nested[0])} is a separate git repository, which cannot be sent."
        fail(f"{message}\n  Exclude it: .gitignore", ExitCode.CONFLICT)


def _reject_oversized(sizes: Mapping[str, int]) -> None:
    """If the changed files are too large to send, fail before git reads them."""
    if sum(sizes.values()) > CHANGED_BYTES_MAX:
        largest = max(sizes, key=sizes.__getitem__)
        actual_size, size_limit = format_size(sum(sizes.values())), format_size(GIT_PATCH_BYTES_MAX)
        message = f"Error: The local changes are {actual_size}; the limit is {size_limit}. "
        largest_hint = f"The largest is {escape_name(largest)} ({format_size(sizes[largest])})."
        fail(f"{message}{largest_hint}\n{_TOO_LARGE_HINT}", ExitCode.CONFLICT)


def _print_files(files: list[ChangedFile]) -> None:
    names = [escape_name(file.path) for file in files[:LISTED_FILES_MAX]]
    more = [f"{len(files) - len(names):,} more"] if len(files) > len(names) else []
    line = f"Including local changes in {pluralize(len(files), 'file')}: {', '.join([*names, *more])}."
    click.echo("\n".join(wrap_text(line, terminal_width(sys.stderr), "  ")), err=True)
