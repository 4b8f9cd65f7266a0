"""The user's own checkout, to which a patch is applied by the user's own git."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail
from sandbox.cli.visible import visible

GIT_SECONDS = 300.0
COMPLAINT_LINES_MAX = 20


@dataclass(frozen=True)
class ChangedFile:
    """One file of a patch; no numbers for a binary one."""

    path: str
    added: int | None
    removed: int | None


class Checkout:
    """A git working tree. Every method ends the command with a sentence where git refuses."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        found = self._run("rev-parse", "--show-toplevel")
        if found.returncode:
            hint = "Go to a checkout of the task's repository, or name one with --directory."
            raise click.UsageError(f"{visible(str(directory))} is not in a git checkout. {hint}")
        self.root = Path(found.stdout.decode(errors="surrogateescape").removesuffix("\n"))

    def commit(self) -> str | None:
        """The commit that is checked out; None before the first."""
        asked = self._run("rev-parse", "--verify", "--quiet", "HEAD")
        return asked.stdout.decode(errors="replace").strip() or None

    def require_clean(self) -> None:
        """Refuse where something that git tracks was changed and is not committed."""
        asked = self._run("status", "--porcelain", "-z", "--untracked-files=no")
        if asked.returncode:
            _refuse("The state of the checkout cannot be told.", asked.stderr)
        if asked.stdout:
            message = f"{visible(str(self.root))} has changes that are not committed, so nothing was applied."
            fail(f"Error: {message}\n  Commit them, or put them aside with: git stash", ExitCode.CONFLICT)

    def apply(self, patch: Path) -> list[ChangedFile]:
        """Apply a patch to the files and the index, all of it or nothing; give what it changed."""
        checked = self._apply("--check", "--index", patch=patch)
        if checked.returncode:
            _refuse("The patch does not fit this checkout, so nothing was applied.", checked.stderr)
        counted = self._apply("--numstat", "-z", patch=patch)
        applied = self._apply("--index", patch=patch)
        if applied.returncode:
            _refuse("git could not apply the patch.", applied.stderr)
        return [_changed(entry) for entry in counted.stdout.split(b"\0") if entry]

    def _apply(self, *options: str, patch: Path) -> subprocess.CompletedProcess[bytes]:
        # Whatever the user's configuration says of white space: the patch is taken as it is.
        return self._run("apply", "--whitespace=nowarn", *options, "--", str(patch.resolve()))

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                ["git", *arguments],  # noqa: S607
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=GIT_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            if self.root.is_dir():
                fail("Error: git is not installed here; install it and try again.", ExitCode.USAGE)
            raise
        except subprocess.TimeoutExpired:
            fail(f"Error: git {arguments[0]} did not end within {GIT_SECONDS:.0f} s.", ExitCode.CONFLICT)


def _refuse(sentence: str, complaint: bytes) -> NoReturn:
    lines = [line for line in complaint.decode(errors="replace").splitlines() if line.strip()]
    more = [f"  … {len(lines) - COMPLAINT_LINES_MAX} more lines"] if len(lines) > COMPLAINT_LINES_MAX else []
    told = [f"  {visible(line.removeprefix('error: '))}" for line in lines[:COMPLAINT_LINES_MAX]]
    fail("\n".join([f"Error: {sentence}", *told, *more]), ExitCode.CONFLICT)


def _changed(entry: bytes) -> ChangedFile:
    added, removed, path = entry.decode(errors="replace").split("\t", 2)
    return ChangedFile(path, *(int(number) if number.isdecimal() else None for number in (added, removed)))
