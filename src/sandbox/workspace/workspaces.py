"""Implements `Workspaces` with the host's git and files."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from sandbox.interfaces.runtime import Confine
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.interfaces.workspace import DetectSecret, FindCredentials, PatchResult, SkippedFile
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.manifest.schema import Repository
from sandbox.primitives.concurrency import run_in_thread
from sandbox.workspace.artifacts import collect
from sandbox.workspace.clone.clone_and_checkout import REPOSITORY_BYTES_MAX, WorkspaceStaging
from sandbox.workspace.clone.confined_clone import RemoteAccess
from sandbox.workspace.clone.socks_proxy import DialPolicy
from sandbox.workspace.diff.base_tree import BaseTree, create_rules_directory
from sandbox.workspace.diff.patch import write_changed_files, write_patch, write_patch_if_unchanged
from sandbox.workspace.git_command import Git

_DEFAULT_DIAL_POLICY = DialPolicy(lambda address: address.is_global, follows_redirects=False)


class GitWorkspaces:
    """Implements `interfaces.workspace.Workspaces`.

    environment: variables of the server's user; HOME, XDG_CONFIG_HOME, GIT_CONFIG_GLOBAL, SSH_AUTH_SOCK and PATH are
        used.
    dial_policy, find_credentials_on_server: see `RemoteAccess`.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        dial_policy: DialPolicy = _DEFAULT_DIAL_POLICY,
        find_credentials_on_server: FindCredentials | None = None,
    ) -> None:
        self._environment = environment
        self._access = RemoteAccess(dial_policy, find_credentials_on_server)
        self._small_trees: dict[tuple[Path, str], BaseTree] = {}
        """Small trees of base commits, keyed by the directory of the attempt and the commit."""

    async def stage(
        self,
        repository: Repository,
        attempt_dir: Path,
        confine: Confine,
        disk_bytes: int,
        patches: Sequence[Path] = (),
    ) -> str:
        """Clone the repository. Returns the full base commit. Implements `Workspaces.stage`."""
        layout = AttemptLayout(attempt_dir)
        bytes_max = min(disk_bytes, REPOSITORY_BYTES_MAX)
        staging = WorkspaceStaging(
            self._environment,
            repository,
            layout,
            confine,
            bytes_max=bytes_max,
            access=self._access,
            patches=patches,
        )
        commit = await staging.run()
        if staging.base_tree is not None:
            self._small_trees[attempt_dir, commit] = staging.base_tree
        return commit

    async def write_patch(
        self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine, detect_secret: DetectSecret
    ) -> PatchResult:
        """Write the agent's changes; the file is empty if there are none. Raises AttemptError (collect_failed)."""
        layout, base = AttemptLayout(attempt_dir), self._small_trees.get((attempt_dir, base_commit))
        if base is not None and await write_patch_if_unchanged(layout, base, target):
            return PatchResult(diff=DiffStatistics(0, 0, 0))
        async with self._confined_git(layout, confine) as git:
            return await write_patch(git, layout, base_commit, target, detect_secret, base)

    async def write_changed_files_archive(
        self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine
    ) -> str | None:
        """Write a tar of new and changed files. Raises AttemptError (collect_failed)."""
        async with self._confined_git(AttemptLayout(attempt_dir), confine) as git:
            return await write_changed_files(git, AttemptLayout(attempt_dir), base_commit, target)

    @asynccontextmanager
    async def _confined_git(self, layout: AttemptLayout, confine: Confine) -> AsyncIterator[Git]:
        """Yield a confined git that ignores the user's settings. Raises AttemptError (collect_failed)."""
        async with AsyncExitStack() as stack:
            try:
                await run_in_thread(lambda _: create_rules_directory(layout.ignore_rules))
                confinement = await stack.enter_async_context(
                    confine([layout.host_git_directory], [layout.ignore_rules])
                )
            except (AttemptError, OSError) as error:
                reason = f"The patch could not be created: {error}"
                raise AttemptError(FailureCode.COLLECT_FAILED, reason) from error
            yield Git(self._environment.get("PATH", os.defpath), confinement=confinement)

    def collect(
        self, workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
    ) -> AsyncIterator[Artifact | SkippedFile]:
        """Copy each matching regular file, sorted by path. Raises AttemptError (collect_failed)."""
        return collect(workspace, patterns, target, taken_names)
