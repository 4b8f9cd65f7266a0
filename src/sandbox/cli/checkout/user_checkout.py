"""The user's checkout: its commit, branch and changes, and runs of the user's own git in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text

GIT_TIMEOUT_SECONDS = 300.0
GIT_ERROR_LINES_MAX = 20

Head = tuple[str | None, str | None]
"""The commit and branch that are checked out."""

_DIFF_OPTIONS = (
    *("--binary", "--full-index", "--unified=3", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--no-relative", "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=none"),
)
"""Options that make diffs independent of the user's configuration."""

NO_BARE_REPOSITORY = ("-c", "safe.bareRepository=explicit")
"""Makes git ignore a bare repository in the working tree. A patch can add one, and git would use its configuration."""

SAFE_CONFIG = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
"""Prevents programs configured in the checkout's git directory from running: the directory may be untrusted."""


class Checkout:
    """A git working tree. Methods exit with an error message if git fails."""

    def __init__(self, directory: Path) -> None:
        self.root = self._directory = directory
        completed = self._git("rev-parse", "--show-toplevel", environment={**os.environ, "LC_ALL": "C"})
        output = os.fsdecode(completed.stdout).removesuffix("\n")
        if not output:
            raise click.UsageError(_not_a_checkout_message(directory, completed.stderr))
        self.root = Path(output)

    @classmethod
    def find(cls, directory: Path) -> Self | None:
        """Return the checkout that contains the directory, or None."""
        try:
            return cls(directory)
        except click.UsageError:
            return None

    def current_commit(self) -> str | None:
        """Return the current commit; None before the first commit."""
        completed = self._git("rev-parse", "--verify", "--quiet", "HEAD")
        return completed.stdout.decode(errors="replace").strip() or None

    def current_branch(self) -> str | None:
        """Return the current branch; None for a detached HEAD."""
        return self.git_output("symbolic-ref", "--quiet", "--short", "HEAD")

    def head(self) -> Head:
        """Return the current commit and branch."""
        return self.current_commit(), self.current_branch()

    def subpath(self) -> str:
        """Return the directory's path inside the checkout; empty for the checkout's root."""
        inside = os.path.relpath(self._directory.resolve(), self.root.resolve())
        return "" if inside == "." else inside

    def run_git(
        self,
        *arguments: str,
        config: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git without hooks and return its output, even if it fails. config: settings such as `name=value`."""
        options = [*SAFE_CONFIG, *(option for setting in config for option in ("-c", setting))]
        return self._start(arguments, options, environment=environment, stdin=stdin)

    def run_git_with_user_config(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run git with the user's complete configuration, including hooks, and with messages in English."""
        return self._start(arguments, environment={**os.environ, "LC_ALL": "C"})

    def git_output(self, *arguments: str) -> str | None:
        """Return git's output without its last newline; None if git fails or prints nothing."""
        completed = self._git(*arguments)
        output = completed.stdout.decode(errors="surrogateescape").removesuffix("\n")
        return output if output and not completed.returncode else None

    def count_changed(self, *, untracked: bool = False) -> int:
        """Count the tracked files with uncommitted changes. untracked: count the untracked files instead."""
        untracked_option = f"--untracked-files={'all' if untracked else 'no'}"
        entries = self._list_entries("status", "--porcelain", "--no-renames", untracked_option)
        return sum(entry.startswith(b"??") for entry in entries) if untracked else len(entries)

    def _list_entries(self, *arguments: str) -> list[bytes]:
        completed = self._git(*arguments, "-z")
        if completed.returncode:
            fail_with_git_output("The state of the checkout cannot be determined.", completed.stderr)
        return [entry for entry in completed.stdout.split(b"\0") if entry]

    def changed_file_sizes(self) -> dict[str, int]:
        """Return the size in bytes of each modified or untracked file.

        A path that ends in a slash is a nested repository.
        """
        paths = {
            os.fsdecode(entry)
            for entry in self._list_entries("ls-files", "--others", "--modified", "--exclude-standard")
        }
        return {path: (self.root / path).lstat().st_size for path in paths if os.path.lexists(self.root / path)}

    def changed_submodules(self) -> list[str]:
        """Return the submodules that contain uncommitted changes."""
        lines = self._list_entries(
            "status", "--porcelain=v2", "--no-renames", "--untracked-files=no", "--ignore-submodules=none"
        )
        entries = [os.fsdecode(line).split(" ", 8) for line in lines if line.startswith(b"1 ")]
        return [entry[8] for entry in entries if entry[2].startswith("S") and entry[2][2:] != ".."]

    def write_diff(self, commit: str, target: Path, scratch: Path) -> None:
        """Write a patch with the changes between a commit and the working tree, including untracked files.

        scratch: directory for a temporary index and objects, so that the user's index and objects stay unchanged.
        """
        objects = self.root / (self.git_output("rev-parse", "--git-path", "objects") or "")
        others = [_quote_path(str(objects)), os.environ.get("GIT_ALTERNATE_OBJECT_DIRECTORIES")]
        (scratch / "objects").mkdir()
        environment = {
            **os.environ,
            "GIT_INDEX_FILE": str(scratch / "index"),
            "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": os.pathsep.join(filter(None, others)),
        }
        difference = ("diff", "--cached", *_DIFF_OPTIONS, f"--output={target}", commit, "--")
        read_tree = () if self._copy_index(scratch / "index") else (("read-tree", "HEAD"),)
        for arguments in (*read_tree, ("add", "--all"), difference):
            done = self._git(*arguments, environment=environment)
            if done.returncode:
                fail_with_git_output("git could not collect the local changes.", done.stderr)

    def _copy_index(self, target: Path) -> bool:
        """Copy the index, so that skip-worktree files, which often contain secrets, are not added.

        Returns whether there is an index.
        """
        index_path = self.root / (self.git_output("rev-parse", "--git-path", "index") or "")
        if not index_path.is_file():
            return False
        shutil.copy2(index_path, target)  # keep its mtime, which git uses to detect changed files
        return True

    def require_clean(self) -> None:
        """Fail if tracked files have uncommitted changes."""
        if self.count_changed():
            message = f"{escape_name(str(self.root))} has uncommitted changes, so nothing was applied."
            advice = (
                "  Stash your changes, or commit them: git stash\n"
                "  Apply the patch on top of your changes: add --beside-changes\n"
                "  Commit the task's changes to a new branch: add --branch NAME"
            )
            fail(f"Error: {message}\n{advice}", ExitCode.CONFLICT)

    def _git(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
        return self._start(arguments, SAFE_CONFIG, environment=environment)

    def _start(
        self,
        arguments: Sequence[str],
        options: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None,
        stdin: bytes = b"",
    ) -> subprocess.CompletedProcess[bytes]:
        return run_git(self.root, arguments, options, environment=environment, stdin=stdin)


def run_git(
    directory: Path,
    arguments: Sequence[str],
    options: Sequence[str] = SAFE_CONFIG,
    *,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a directory and return its output, even if it fails. Exits with an error after GIT_TIMEOUT_SECONDS."""
    try:
        return subprocess.run(
            ["git", *NO_BARE_REPOSITORY, *options, *arguments],  # noqa: S607
            cwd=directory,
            env=environment,
            input=stdin,
            capture_output=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        if directory.is_dir():
            fail("Error: git is not installed; install it and try again.", ExitCode.USAGE)
        raise
    except subprocess.TimeoutExpired:
        fail(f"Error: git {arguments[0]} did not end within {GIT_TIMEOUT_SECONDS:.0f} s.", ExitCode.CONFLICT)


def _not_a_checkout_message(directory: Path, stderr: bytes) -> str:
    """Return git's own message if it rejects the repository, for example because another user owns it."""
    if stderr and b"not a git repository" not in stderr:
        lines = stderr.decode(errors="replace").removeprefix("fatal: ").splitlines()
        return "\n".join(escape_text(line) for line in lines if line.strip())
    hint = "Change to a checkout of the task's repository, or set --directory."
    return f"{escape_name(str(directory.resolve()))} is not in a git checkout. {hint}"


def _quote_path(path: str) -> str:
    """Quote a path for git's colon-separated list of paths."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def fail_with_git_output(sentence: str, stderr: bytes, advice: str = "") -> NoReturn:
    """Exit with an error that consists of a sentence, the first lines of git's output, and the lines of advice."""
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    more = [f"  … {len(lines) - GIT_ERROR_LINES_MAX} more lines"] if len(lines) > GIT_ERROR_LINES_MAX else []
    shown = [f"  {escape_text(line.removeprefix('error: '))}" for line in lines[:GIT_ERROR_LINES_MAX]]
    advised = [f"  {advice}"] if advice else []
    fail("\n".join([f"Error: {sentence}", *shown, *more, *advised]), ExitCode.CONFLICT)
