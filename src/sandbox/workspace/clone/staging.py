"""Staging: a repository becomes a workspace.

The host clones into a bare repository of its own, which no sandbox ever sees, and checks the base commit out into the
workspace, whose `.git` is a copy. Without a commit in the manifest the clone is one commit deep; with one it has the
whole history of the branch, because only that shows whether the commit is on it.
"""

import asyncio
import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import IO

from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import Confine, Confinement, ConfinementLostError
from sandbox.model.disk_space import NO_ROOM
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import KILLED_GIT_SECONDS
from sandbox.model.manifest.schema import Repository
from sandbox.model.printable import escaped, printable
from sandbox.workspace.cancellable_thread import Stop, run_in_thread
from sandbox.workspace.clone.cloning import NO_REDIRECTS, Cloning
from sandbox.workspace.clone.relay import Reach
from sandbox.workspace.clone.remote import SSH
from sandbox.workspace.diff.trees import BaseEntry, list_tree, read_entries
from sandbox.workspace.files import DEPTH_MAX, ENTRIES_MAX, PATH_BYTES_MAX, PATHS_BYTES_MAX, Files
from sandbox.workspace.git.command import Git, GitError, Setting, pipe, run_with_thread
from sandbox.workspace.git.directory import OBJECT_ID, neutralise, read_branch, write_git_directory
from sandbox.workspace.git.errors import NO_ROOM_MEANING, explain, is_transient
from sandbox.workspace.git.user_config import read_user_settings, secrets_in, variables_of_user

COMMIT_MESSAGE = "Work that came with the task"
_WHO = "Sandbox <sandbox@localhost> 0 +0000"
"""The same work makes the same commit, in every attempt."""

_COMPLAINT_CHARACTERS_MAX = 300


async def commit_sent_work(path: str, confinement: Confinement, repository: Path, base: str, patch: str) -> str:
    """The commit, in a pack of its own. repository: the host's bare one; patch: base64 of what `git diff` wrote.

    Raises AttemptError (clone_failed) when it does not apply; GitError, OSError.
    """
    git = Git(path, variables={"GIT_INDEX_FILE": "sent.index"}, confinement=confinement)
    run = partial(git.run, "--git-dir=.", directory=repository)
    await run("read-tree", base)
    try:
        await run("apply", "--cached", "--whitespace=nowarn", "-", stdin=_file(base64.b64decode(patch)))
    except GitError as error:
        if error.was_hindered:
            raise
        complaint = printable(error.complaint.strip().replace("error: ", ""), escaped)[:_COMPLAINT_CHARACTERS_MAX]
        message = f"repository.patch does not apply to commit {base[:12]}: {complaint or 'git gave it up'}."
        raise AttemptError(FailureCode.CLONE_FAILED, message) from None
    tree = _object_id(await run("write-tree"))
    text = f"tree {tree}\nparent {base}\nauthor {_WHO}\ncommitter {_WHO}\n\n{COMMIT_MESSAGE}\n"
    commit = _object_id(await run("hash-object", "-t", "commit", "-w", "--stdin", stdin=_file(text.encode())))
    # The workspace's git directory gets packs alone.
    wanted = _file(f"{commit}\n^{base}\n".encode())
    await run("pack-objects", "--quiet", "--revs", "objects/pack/pack", stdin=wanted)
    return commit


def _object_id(answer: bytes) -> str:
    found = answer.decode(errors="replace").strip()
    if not OBJECT_ID.fullmatch(found):
        raise GitError(0, b"fatal: git did not name what it wrote")
    return found


def _file(data: bytes) -> IO[bytes]:
    """In memory, to be read from its beginning."""
    file = os.fdopen(os.memfd_create("sent"), "w+b")
    file.write(data)
    file.seek(0)
    return file


REPOSITORY_BYTES_MAX = 32 * 1024**3
"""A file of a clone (its pack), and the files of a commit together, or `vm.disk` where that is less; over it:
`clone_failed`."""

_NETWORK: tuple[Setting, ...] = (
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "60"),
    ("credential.interactive", "false"),
    ("transfer.fsckObjects", "true"),
)
_UNCONFINED: tuple[Setting, ...] = (("core.sshCommand", SSH),)
_TOLERATED = (
    *("badDate", "badDateOverflow", "badEmail", "badName", "badTimezone", "missingEmail", "missingNameBeforeEmail"),
    *("missingSpaceBeforeDate", "missingSpaceBeforeEmail", "multipleAuthors", "nulInCommit", "zeroPaddedDate"),
    *("zeroPaddedFilemode", "badTagName", "missingTaggerEntry"),
)
"""Old faults in who and when, and in the spelling of modes, which real histories have and which harm nobody."""


class Staging:
    """One clone."""

    def __init__(
        self,
        environment: Mapping[str, str],
        repository: Repository,
        attempt: AttemptLayout,
        confine: Confine,
        *,
        bytes_max: int,
        reach: Reach,
    ) -> None:
        """bytes_max: of each file of the clone, and of the commit's files together."""
        self._environment = environment
        self._path = environment.get("PATH", os.defpath)
        self._confine = confine
        self._wanted = repository
        self._attempt = attempt
        self._bytes_max = bytes_max
        self._redirects: Sequence[Setting] = () if reach.follows_redirects else (NO_REDIRECTS,)
        self._reach = reach
        self._secrets: set[str] = set()

    async def run(self) -> str:
        """Gives the full base commit. Raises AttemptError (clone_failed, sandbox_lost)."""
        try:
            await run_in_thread(lambda _: self._clear())
            async with self._confine([self._attempt.repository], []) as confinement:
                await self._clone(confinement)
                commit = await self._prepare(confinement)
            # No git has seen the workspace until here: what is written there leads nowhere else.
            await run_in_thread(lambda stop: self._write_git_directory(commit, stop))
            async with self._confine([self._attempt.workspace], []) as confinement:
                await self._check_out(Git(self._path, confinement=confinement), commit)
            await run_in_thread(lambda _: self._check_subpath())
        except GitError as error:
            if error.may_be_killed:
                # Who kills git may be about to kill its runner: then that is why, and another attempt follows.
                await asyncio.sleep(KILLED_GIT_SECONDS)
            message = explain(error.complaint, self._wanted, self._secrets)
            code, transient = FailureCode.CLONE_FAILED, is_transient(error.complaint)
            raise AttemptError(code, message, is_transient=transient) from None
        except ConfinementLostError as error:
            raise AttemptError(FailureCode.SANDBOX_LOST, f"Cloning was broken off: {error}.") from error
        except OSError as error:
            reason = NO_ROOM_MEANING if error.errno in NO_ROOM else error.strerror or error
            raise _failed(f"Cannot clone {self._wanted.url}: {reason}.") from error
        return commit

    async def _prepare(self, confinement: Confinement) -> str:
        git = Git(self._path, confinement=confinement)
        commit = await self._find_commit(git)
        if self._wanted.patch is not None:
            where = (self._path, confinement, self._attempt.repository)
            commit = await commit_sent_work(*where, commit, self._wanted.patch)
        await self._check_size(git, commit)
        return commit

    def _clear(self) -> None:
        """Take away what an earlier, broken try left, and begin with two empty directories."""
        self._attempt.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (self._attempt.repository, self._attempt.workspace):
            if left.is_symlink() or left.is_file():
                left.unlink()
            elif left.exists():
                rmtree(left)
            left.mkdir(mode=0o755)

    async def _clone(self, confinement: Confinement) -> None:
        user_settings = await read_user_settings(self._environment, self._path)
        self._secrets = set(secrets_in(user_settings))
        settings = [*_NETWORK, *((f"fetch.fsck.{fault}", "ignore") for fault in _TOLERATED)]
        arguments = (
            *("clone", "--quiet", "--bare", "--template=", "--single-branch", "--no-tags"),
            *(f"--branch={self._wanted.branch}", *(("--depth=1",) if self._wanted.commit is None else ())),
            *("--", self._wanted.url, "."),
        )
        if confinement.door is None:
            variables = variables_of_user(self._environment)
            git = Git(self._path, [*_UNCONFINED, *settings, *user_settings, *self._redirects], variables)
            await git.run(*arguments, directory=self._attempt.repository, file_bytes_max=self._bytes_max)
            return
        cloning = Cloning(self._wanted.url, user_settings, self._environment, reach=self._reach)
        try:
            await cloning.run(
                confinement, settings, arguments, self._attempt.repository, file_bytes_max=self._bytes_max
            )
        finally:
            self._secrets |= cloning.secrets

    async def _find_commit(self, git: Git) -> str:
        repository = self._attempt.repository
        tip = await run_in_thread(lambda _: read_branch(repository, self._wanted.branch))
        if tip is None:
            raise _failed(f"'{self._wanted.branch}' is no branch of {self._wanted.url}; check repository.branch.")
        await run_in_thread(lambda _: neutralise(repository))
        return tip if self._wanted.commit is None else await self._find_on_branch(git, self._wanted.commit.lower(), tip)

    async def _find_on_branch(self, git: Git, wanted: str, tip: str) -> str:
        problem = f"Commit {wanted} is not on branch '{self._wanted.branch}' of {self._wanted.url}"
        try:
            found = await self._run(git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{wanted}^{{commit}}")
            commit = found.decode(errors="replace").strip()
            if commit.startswith(wanted) and OBJECT_ID.fullmatch(commit):
                await self._run(git, "merge-base", "--is-ancestor", commit, tip)
                return commit
        except GitError as error:
            if error.was_hindered:
                raise
            if "ambiguous" in error.complaint:
                problem = f"Commit {wanted} stands for more than one object of {self._wanted.url}"
        raise _failed(f"{problem}; give the full name of a commit that the branch contains in repository.commit.")

    async def _check_size(self, git: Git, commit: str) -> None:
        with pipe() as (reading, writing):

            def work(stop: Stop) -> None:
                problem = _oversize(read_entries(reading), self._bytes_max)
                if problem is not None:
                    raise _failed(f"Cannot check out {self._wanted.url}: {problem}.")

            repository = self._attempt.repository
            listing = git.run(*list_tree(commit), directory=repository, stdout=writing)
            await run_with_thread(work, listing)

    def _write_git_directory(self, commit: str, stop: Stop) -> None:
        write_git_directory(self._attempt.workspace, self._attempt.repository, self._wanted, commit, stop)

    async def _check_out(self, git: Git, commit: str) -> None:
        await git.run(
            *("--git-dir=.git", "--work-tree=.", "read-tree", "-m", "-u", commit),
            directory=self._attempt.workspace,
        )

    def _check_subpath(self) -> None:
        if self._wanted.subpath is None:
            return
        names = [name for name in self._wanted.subpath.split("/") if name not in ("", ".")]
        with Files(self._attempt.workspace) as files:
            try:
                with files.open_directory("/".join(names).encode()):
                    return
            except OSError:
                pass
        raise _failed(
            f"'{self._wanted.subpath}' is not a directory in branch '{self._wanted.branch}' of {self._wanted.url} "
            "(symbolic links do not count); check repository.subpath."
        )

    async def _run(self, git: Git, *arguments: str) -> bytes:
        return await git.run("--git-dir=.", *arguments, directory=self._attempt.repository)


def _oversize(entries: Iterator[BaseEntry], bytes_max: int) -> str | None:
    """A few small trees can name each other so often that a checkout never ends: find that out before."""
    bytes_left, path_bytes_left = bytes_max, PATHS_BYTES_MAX
    for number, entry in enumerate(entries):
        bytes_left -= entry.size_bytes
        path_bytes_left -= len(entry.path)
        if number >= ENTRIES_MAX:
            return f"the commit has more than {ENTRIES_MAX} files"
        if bytes_left < 0:
            return (
                f"the files of the commit are larger than {bytes_max / 1024**3:.3g} GiB; raise vm.disk (to 32G at most)"
            )
        if path_bytes_left < 0:
            return f"the paths of the commit are longer than {PATHS_BYTES_MAX // 1024**2} MiB together"
        if len(entry.path) > PATH_BYTES_MAX:
            return f"a path of the commit is longer than {PATH_BYTES_MAX} bytes"
        if entry.path.count(b"/") >= DEPTH_MAX:
            return "directories of the commit are nested too deeply"
    return None


def _failed(message: str) -> AttemptError:
    return AttemptError(FailureCode.CLONE_FAILED, message)
