"""Stages a repository as a workspace, and explains failures of the clone.

The host clones into a bare repository, which is not mounted in any sandbox. It then checks out the base commit into the
workspace, whose `.git` is a copy. Without a commit in the manifest, the clone has depth 1. With a commit, it has the
full history of the branch, because only that shows whether the commit is on the branch.
"""

import asyncio
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from shutil import rmtree

from sandbox.interfaces.runtime import Confine, Confinement, ConfinementLostError
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.interfaces.workspace import NoCredentialsError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import GIT_KILLED_GRACE_SECONDS
from sandbox.model.manifest.schema import Repository
from sandbox.model.resources import DISK_FULL_ERRNOS
from sandbox.primitives.concurrency import StopFlag, run_in_thread, running_in_background
from sandbox.workspace.clone.confined_clone import DEFAULT_SSH_COMMAND, ConfinedClone, RemoteAccess, redirect_settings
from sandbox.workspace.clone.git_directory import (
    OBJECT_ID,
    commit_patches,
    earlier_task_patch,
    manifest_patch,
    neutralize_attributes,
    read_branch_commit,
    write_git_directory,
)
from sandbox.workspace.clone.remote_access import (
    CredentialHelper,
    UserCredentials,
    apply_instead_of,
    find_values_to_redact,
    read_user_config,
    serve_credentials,
    unconfined_helper_settings,
    user_environment,
)
from sandbox.workspace.diff.base_tree import TREE_MODE, BaseTree, BaseTreeEntry, ls_tree_arguments, parse_ls_tree
from sandbox.workspace.git_command import (
    _LINE_CHARACTERS_MAX,
    DISK_FULL_MESSAGE,
    SILENT_INDEX_PACK_ERROR,
    Git,
    GitError,
    GitSetting,
    last_error_line,
    pipe,
    run_thread_with_git,
)
from sandbox.workspace.rooted_files import DEPTH_MAX, ENTRIES_MAX, PATH_BYTES_MAX, PATHS_BYTES_MAX, RootedFiles

REPOSITORY_BYTES_MAX = 32 * 1024**3
"""Maximum size of each file of a clone (its pack), and total size of a commit's files, unless `vm.disk` is less.

A task that exceeds it fails with `clone_failed`.
"""

_NETWORK_SETTINGS: tuple[GitSetting, ...] = (
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "60"),
    ("credential.interactive", "false"),
    ("transfer.fsckObjects", "true"),
)
_UNCONFINED_SETTINGS: tuple[GitSetting, ...] = (("core.sshCommand", DEFAULT_SSH_COMMAND),)
_TOLERATED_FSCK_FAULTS = (
    *("badDate", "badDateOverflow", "badEmail", "badName", "badTimezone", "missingEmail", "missingNameBeforeEmail"),
    *("missingSpaceBeforeDate", "missingSpaceBeforeEmail", "multipleAuthors", "nulInCommit", "zeroPaddedDate"),
    *("zeroPaddedFilemode", "badTagName", "missingTaggerEntry"),
)
"""Harmless defects in authors, dates and the format of modes, which real histories contain."""


_KEPT_ENTRIES_MAX = 1000
"""A base tree with at most this many entries, directories included, stays in memory for the patch."""


class WorkspaceStaging:
    """Clones one repository into one attempt's workspace."""

    def __init__(
        self,
        environment: Mapping[str, str],
        repository: Repository,
        layout: AttemptLayout,
        confine: Confine,
        *,
        bytes_max: int,
        access: RemoteAccess,
        patches: Sequence[Path] = (),
    ) -> None:
        """bytes_max: limit for each file of the clone, and for the total size of the commit's files.

        patches: files with changes; each becomes a commit on top of the one before. The first follows the repository's
            commit or, if there is one, the commit of `repository.patch`.
        """
        self._environment = environment
        self._path = environment.get("PATH", os.defpath)
        self._confine = confine
        self._repository = repository
        self._layout = layout
        self._bytes_max = bytes_max
        self._access = access
        self._patches = patches
        self._secrets: set[str] = set()
        self._credential_problem: NoCredentialsError | None = None
        self.base_tree: BaseTree | None = None
        """The tree of the base commit if it is small. Set by `run`."""

    async def run(self) -> str:
        """Clone the repository, check out the base commit, and return the commit's full name.

        Raises AttemptError (clone_failed, sandbox_lost, provision_failed).
        """
        try:
            await run_in_thread(lambda _: self._reset_directories())
            async with AsyncExitStack() as stack:
                # The settings are read while the confinement is created.
                settings = await stack.enter_async_context(
                    running_in_background(read_user_config(self._environment, self._path))
                )
                directories = [self._layout.host_git_directory, self._layout.workspace]
                confinement = await stack.enter_async_context(self._confine(directories, []))
                await self._clone(confinement, await settings)
                commit = await self._prepare_commit(confinement)
                # No git has run in the workspace yet, so no path there can be a link that leads elsewhere.
                await run_in_thread(lambda stop: self._write_git_directory(commit, stop))
                await confinement.transfer_ownership(self._layout.workspace)
                await self._check_out(Git(self._path, confinement=confinement), commit)
            await run_in_thread(lambda _: self._check_subpath())
        except GitError as error:
            if error.is_possibly_killed:
                # The process that killed git may also be about to kill the runner. In that case another attempt
                # follows.
                await asyncio.sleep(GIT_KILLED_GRACE_SECONDS)
            message = explain_clone_failure(error.stderr, self._repository, self._secrets)
            transient = is_transient(error.stderr)
            if (problem := self._credential_problem) is not None:
                message, transient = f"{message} {problem}", transient or problem.is_transient
            raise AttemptError(FailureCode.CLONE_FAILED, message, is_transient=transient) from None
        except ConfinementLostError as error:
            raise AttemptError(FailureCode.SANDBOX_LOST, f"Cloning was aborted: {error}.") from error
        except OSError as error:
            reason = DISK_FULL_MESSAGE if error.errno in DISK_FULL_ERRNOS else error.strerror or error
            raise _clone_failed(f"Cannot clone {self._repository.url}: {reason}.") from error
        return commit

    async def _prepare_commit(self, confinement: Confinement) -> str:
        git = Git(self._path, confinement=confinement)
        commit = await self._find_commit(git)
        manifest_patches = [] if self._repository.patch is None else [manifest_patch(self._repository.patch)]
        for patches in (manifest_patches, [earlier_task_patch(path) for path in self._patches]):
            if patches:
                arguments = (self._path, confinement, self._layout.host_git_directory, commit, patches)
                commit = await commit_patches(*arguments, bytes_max=self._bytes_max)
        await self._check_size(git, commit)
        return commit

    def _reset_directories(self) -> None:
        """Remove leftovers of an interrupted earlier run, and create both directories again."""
        self._layout.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self._layout.host_git_directory, self._layout.workspace):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                rmtree(path)
            path.mkdir(mode=0o755)

    async def _clone(self, confinement: Confinement, user_settings: Sequence[GitSetting]) -> None:
        self._secrets = set(find_values_to_redact(user_settings))
        settings = [*_NETWORK_SETTINGS, *((f"fetch.fsck.{fault}", "ignore") for fault in _TOLERATED_FSCK_FAULTS)]
        arguments = (
            *("clone", "--quiet", "--bare", "--template=", "--single-branch", "--no-tags"),
            *(f"--branch={self._repository.branch}", *(("--depth=1",) if self._repository.commit is None else ())),
            *("--", self._repository.url, "."),
        )
        if confinement.proxy_listener is None:
            await self._clone_unconfined(settings, user_settings, arguments)
            return
        cloning = ConfinedClone(self._repository.url, user_settings, self._environment, self._access)
        try:
            await cloning.run(
                confinement, settings, arguments, self._layout.host_git_directory, file_bytes_max=self._bytes_max
            )
        finally:
            self._note_credentials(cloning)

    async def _clone_unconfined(
        self, settings: Sequence[GitSetting], user_settings: Sequence[GitSetting], arguments: Sequence[str]
    ) -> None:
        """Clone with the privileges of this process. Only the server's credentials need a helper."""
        variables, find_on_server = user_environment(self._environment), self._access.find_credentials_on_server
        url = apply_instead_of(self._repository.url, user_settings)
        async with AsyncExitStack() as stack:
            descriptors: Sequence[int] = ()
            if find_on_server is not None and url.startswith(("http://", "https://")):
                user_credentials = UserCredentials(url, user_settings, variables, self._path)
                helper = CredentialHelper(url, user_credentials.find, find_on_server)
                stack.callback(self._note_credentials, helper)
                descriptors = await stack.enter_async_context(serve_credentials(helper))
                user_settings = unconfined_helper_settings(user_settings, descriptors)
            redirects = redirect_settings(self._access.dial_policy)
            git = Git(
                self._path,
                [*_UNCONFINED_SETTINGS, *settings, *user_settings, *redirects],
                variables,
                descriptors=descriptors,
            )
            await git.run(*arguments, directory=self._layout.host_git_directory, file_bytes_max=self._bytes_max)

    def _note_credentials(self, helper: CredentialHelper | ConfinedClone) -> None:
        """Record the passwords that messages must not contain, and why the server had no credentials."""
        self._secrets |= helper.secrets
        self._credential_problem = helper.credential_problem

    async def _find_commit(self, git: Git) -> str:
        repository = self._layout.host_git_directory
        tip = await run_in_thread(lambda _: read_branch_commit(repository, self._repository.branch))
        if tip is None:
            raise _clone_failed(
                f"'{self._repository.branch}' is not a branch of {self._repository.url}; check repository.branch."
            )
        await run_in_thread(lambda _: neutralize_attributes(repository))
        return (
            tip
            if self._repository.commit is None
            else await self._find_on_branch(git, self._repository.commit.lower(), tip)
        )

    async def _find_on_branch(self, git: Git, commit_prefix: str, tip: str) -> str:
        problem = f"Commit {commit_prefix} is not on branch '{self._repository.branch}' of {self._repository.url}"
        try:
            result = await self._run(
                git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit_prefix}^{{commit}}"
            )
            commit = result.decode(errors="replace").strip()
            if commit.startswith(commit_prefix) and OBJECT_ID.fullmatch(commit):
                await self._run(git, "merge-base", "--is-ancestor", commit, tip)
                return commit
        except GitError as error:
            if error.is_inconclusive:
                raise
            if "ambiguous" in error.stderr:
                problem = f"Commit {commit_prefix} is ambiguous in {self._repository.url}"
        raise _clone_failed(f"{problem}; set repository.commit to the full name of a commit on the branch.")

    async def _check_size(self, git: Git, commit: str) -> None:
        with pipe() as (reader, writer):

            def work(stop: StopFlag) -> None:
                listed: list[BaseTreeEntry] = []
                reason = _find_size_problem(_keep_first(parse_ls_tree(reader), listed), self._bytes_max)
                if reason is not None:
                    raise _clone_failed(f"Cannot check out {self._repository.url}: {reason}.")
                if len(listed) <= _KEPT_ENTRIES_MAX:
                    self.base_tree = BaseTree(entry for entry in listed if entry.mode != TREE_MODE)

            repository = self._layout.host_git_directory
            listing = git.run(*ls_tree_arguments(commit, "-t"), directory=repository, stdout=writer)
            await run_thread_with_git(work, listing)

    def _write_git_directory(self, commit: str, stop: StopFlag) -> None:
        write_git_directory(self._layout.workspace, self._layout.host_git_directory, self._repository, commit, stop)

    async def _check_out(self, git: Git, commit: str) -> None:
        await git.run(
            *("--git-dir=.git", "--work-tree=.", "read-tree", "-m", "-u", commit),
            directory=self._layout.workspace,
        )

    def _check_subpath(self) -> None:
        if self._repository.subpath is None:
            return
        names = [name for name in self._repository.subpath.split("/") if name not in ("", ".")]
        with RootedFiles(self._layout.workspace) as files:
            try:
                with files.open_directory("/".join(names).encode()):
                    return
            except OSError:
                pass
        raise _clone_failed(
            f"'{self._repository.subpath}' is not a directory in branch '{self._repository.branch}' of "
            f"{self._repository.url} (symbolic links do not count); check repository.subpath."
        )

    async def _run(self, git: Git, *arguments: str) -> bytes:
        return await git.run("--git-dir=.", *arguments, directory=self._layout.host_git_directory)


def _find_size_problem(entries: Iterator[BaseTreeEntry], bytes_max: int) -> str | None:
    """Return why the commit is too large, or None if it is not.

    A few small trees can contain each other so many times that a checkout would never end.

    entries: including directories, because trees without files can be nested in this way too.
    """
    bytes_left, entries_left, path_bytes_left = bytes_max, ENTRIES_MAX, PATHS_BYTES_MAX
    for entry in entries:
        if len(entry.path) > PATH_BYTES_MAX:
            return f"a path in the commit is longer than {PATH_BYTES_MAX} bytes"
        if entry.path.count(b"/") >= DEPTH_MAX:
            return "directories in the commit are nested too deeply"
        bytes_left -= entry.size_bytes
        entries_left -= 1
        path_bytes_left -= len(entry.path)
        if entries_left < 0:
            return f"the commit has more than {ENTRIES_MAX} files and directories"
        if bytes_left < 0:
            return f"the files in the commit total more than {bytes_max / 1024**3:.3g} GiB; raise vm.disk (up to 32G)"
        if path_bytes_left < 0:
            return f"the paths in the commit total more than {PATHS_BYTES_MAX // 1024**2} MiB"
    return None


def _keep_first(entries: Iterator[BaseTreeEntry], kept: list[BaseTreeEntry]) -> Iterator[BaseTreeEntry]:
    """Yield the entries, and append them to `kept` until there are more than _KEPT_ENTRIES_MAX."""
    for entry in entries:
        if len(kept) <= _KEPT_ENTRIES_MAX:
            kept.append(entry)
        yield entry


def _clone_failed(message: str) -> AttemptError:
    return AttemptError(FailureCode.CLONE_FAILED, message)


_SEARCHED_LINES_MAX = 1000
"""Number of lines at the end of git's output in which the cause of a failure is searched for."""

_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_CREDENTIALS_HINT = (
    "give the server's user access (credential.helper or http.<url>.extraHeader in its git configuration, or an ssh "
    "key), and check that this access covers the repository"
)
# The scheme is matched once per word and limited in length, because the remote may send a megabyte of letters.
_URL = re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,31}://[^\s']+", re.IGNORECASE)
_EXPLANATIONS = (
    # This entry must be first: if a program of git runs out of memory, git also reports a broken connection.
    (
        r"out of memory",
        "it contains objects that are too large for git's memory; raise vm.memory (to 4G at most)",
    ),
    (r"remote branch .* not found", "it has no branch '{branch}'; check repository.branch"),
    (
        r"could not read (username|password)|authentication failed|returned error: 40[13]|permission denied"
        r"|terminal prompts disabled|unable to get password",
        f"it does not exist or needs credentials; check repository.url, or {_CREDENTIALS_HINT}",
    ),
    (
        r"host key verification failed",
        "the host's ssh key is not known; add it to the known_hosts of the server's user",
    ),
    (
        r"repository '.*' not found|not valid: is this a git repository|returned error: 404"
        r"|does not appear to be a git repository|repository not found",
        f"there is no repository, or it needs credentials; check repository.url, or {_CREDENTIALS_HINT}",
    ),
    (
        r"could not resolve (host|hostname|proxy)|name or service not known|SOCKS5 connection to .* \(4\)",
        "the name of its host cannot be resolved; check repository.url and the server's network",
    ),
    (
        r"failed to connect|could(n't| not) connect|connection refused|no route to host|network is unreachable"
        r"|SOCKS5 connection to .* \([35]\)",
        "its host cannot be reached; check repository.url and the server's network",
    ),
    (
        r"timed out|operation too slow|connection reset|unexpected disconnect|early eof|empty reply|recv failure",
        "the connection broke; try again",
    ),
    (
        r"transport '.*' not allowed|protocol .* (not supported|disabled)|unsupported protocol",
        "only https, http and ssh are allowed; check repository.url and url.<base>.insteadOf of the server's user",
    ),
    (r"ssl|certificate|tls", "the TLS connection failed; check the certificate of its host"),
    (
        r"unable to update url base from redirection|redirect|returned error: 30\d|SOCKS5 connection to .* \(2\)",
        "it redirects to another URL; use the final one",
    ),
    (r"returned error: 5\d\d", "its host responds with a server error; try again later"),
    (r"no space left on device|disk quota", DISK_FULL_MESSAGE),
    (r"file too large|died of signal 25", "it is larger than the size limit for clones; raise vm.disk (up to 32G)"),
    (r"fsck error|invalid path|badtree|refusing to create", "it contains malformed objects"),
    (
        r"failed to execute (git|prlimit)|setpriv is not installed",
        "the server lacks git or setpriv; install git and util-linux",
    ),
    (r"(?<![\w/.-])ssh: (command )?not found", "the server lacks ssh; install openssh-client"),
    (
        rf"\A\s*{SILENT_INDEX_PACK_ERROR}\s*\Z",
        "it is probably larger than the size limit for clones; raise vm.disk (up to 32G)",
    ),
)
_TRANSIENT = re.compile(
    r"timed out|operation too slow|connection reset|unexpected disconnect|early eof|empty reply|recv failure"
    r"|returned error: (429|5\d\d)",
    re.IGNORECASE,
)
"""Errors of a connection that was established and then broke, and temporary failures that the host reports.

If a name or an address does not respond at all, an error in the manifest is just as likely.
"""


def is_transient(stderr: str) -> bool:
    """Return whether a retry may succeed."""
    is_memory = "out of memory" in stderr.lower()
    return _TRANSIENT.search(stderr) is not None and not is_memory


def explain_clone_failure(stderr: str, repository: Repository, secrets: Collection[str]) -> str:
    """Explain why cloning failed. At most one line of git's output is shown, without the secrets."""
    # Words in a URL, for example openssl, say nothing about the failure.
    lines = _URL.sub("", stderr.replace(repository.url, "")).split("\n")
    searched = "\n".join(line[:_LINE_CHARACTERS_MAX] for line in lines[-_SEARCHED_LINES_MAX:])
    for pattern, explanation in _EXPLANATIONS:
        if re.search(pattern, searched, re.IGNORECASE):
            return f"Cannot clone {repository.url}: {explanation.format(branch=repository.branch)}."
    line = last_error_line(redact_credentials(stderr, secrets)) or "nothing"
    return f"Cannot clone {repository.url}: git reported: {line}"


def redact_credentials(text: str, secrets: Collection[str]) -> str:
    """Replace the secrets, and any credentials in URLs, with asterisks."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _CREDENTIALS_IN_URL.sub("***@", text)
