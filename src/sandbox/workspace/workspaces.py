"""The `Workspaces` of this machine: git and files of the host."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout
from sandbox.contracts.workspace import LeftOut
from sandbox.model.artifact import Artifact
from sandbox.model.manifest import Repository
from sandbox.workspace.changed_files import write_changed_files
from sandbox.workspace.collection import collect
from sandbox.workspace.git import Git
from sandbox.workspace.patch import write_patch
from sandbox.workspace.staging import Staging


class GitWorkspaces:
    """See `sandbox.contracts.workspace.Workspaces`.

    environment: of the server's user; HOME, XDG_CONFIG_HOME, GIT_CONFIG_GLOBAL, SSH_AUTH_SOCK and PATH are looked at.
    follow_redirects: the first request of a clone may be sent on to another place.
    """

    def __init__(self, environment: Mapping[str, str], *, follow_redirects: bool = True) -> None:
        self._environment = environment
        self._follow_redirects = follow_redirects

    async def stage(self, repository: Repository, attempt_dir: Path) -> str:
        """Clone; gives the full base commit. Raises AttemptError (clone_failed)."""
        layout = AttemptLayout(attempt_dir)
        return await Staging(self._environment, repository, layout, follow_redirects=self._follow_redirects).run()

    async def patch(self, attempt_dir: Path, base_commit: str, target: Path) -> str | None:
        """Write what the agent changed, an empty file when nothing was. Raises AttemptError (collect_failed)."""
        return await write_patch(self._git, AttemptLayout(attempt_dir), base_commit, target)

    async def changed_files(self, attempt_dir: Path, base_commit: str, target: Path) -> str | None:
        """Write a tar of what the agent made or changed. Raises AttemptError (collect_failed)."""
        return await write_changed_files(self._git, AttemptLayout(attempt_dir), base_commit, target)

    @property
    def _git(self) -> Git:
        """Without the settings of the server's user."""
        return Git(self._environment.get("PATH", os.defpath))

    def collect(
        self, workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
    ) -> AsyncIterator[Artifact | LeftOut]:
        """Copy each regular file that matches, in the order of their paths. Raises AttemptError (collect_failed)."""
        return collect(workspace, patterns, target, taken_names)
