"""Commits the patches of the manifest and of earlier tasks on top of the base commit."""

import base64
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.interfaces.runtime import Confinement
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.printable import escape_character, replace_unprintable
from sandbox.workspace.cancellable_thread import run_in_thread
from sandbox.workspace.clone.git_directory_writer import OBJECT_ID
from sandbox.workspace.git.command import Git, GitError
from sandbox.workspace.rooted_files import RootedFiles

INITIAL_COMMIT_MESSAGE = "Work that came with the task"
CHAIN_COMMIT_MESSAGE = "Changes of an earlier task"
_IDENTITY = "Sandbox <sandbox@localhost> 0 +0000"
"""Fixed, so that the same patch results in the same commit in every attempt."""

_STDERR_CHARACTERS_MAX = 300
_LOOSE_DIRECTORY_CHARACTERS = 2


class PatchToCommit(NamedTuple):
    """Changes to commit before the agent starts. name: for messages. open: returns the output of `git diff`."""

    name: str
    message: str
    open: Callable[[], IO[bytes]]


def manifest_patch(patch: str) -> PatchToCommit:
    """Return the changes in the manifest's `repository.patch`. patch: base64."""
    return PatchToCommit("repository.patch", INITIAL_COMMIT_MESSAGE, lambda: _memory_file(base64.b64decode(patch)))


def earlier_task_patch(path: Path) -> PatchToCommit:
    """Return the changes of an earlier task. path: the file with its patch."""
    return PatchToCommit(f"The work of an earlier task ({path.name})", CHAIN_COMMIT_MESSAGE, lambda: path.open("rb"))


async def commit_patches(
    path: str,
    confinement: Confinement,
    repository: Path,
    base: str,
    patches: Sequence[PatchToCommit],
    *,
    bytes_max: int,
) -> str:
    """Commit each patch on top of the one before, starting at `base`, in a separate pack. Returns the last commit.

    repository: the host's bare repository. bytes_max: limit on the total size of the files that the commits change:
    even a one-line patch stores the whole file again. Raises AttemptError (clone_failed) if a patch does not
    apply or the limit is exceeded; GitError, OSError.
    """
    git = Git(path, variables={"GIT_INDEX_FILE": "sent.index"}, confinement=confinement)
    run = partial(git.run, "--git-dir=.", directory=repository)
    commit = base
    await run("read-tree", base)
    for patch in patches:
        commit = await _commit_patch(run, commit, patch)
        if await run_in_thread(lambda _: _measure_loose_objects(repository)) > bytes_max:
            limit = f"{bytes_max / 1024**3:.3g} GiB"
            raise AttemptError(
                FailureCode.CLONE_FAILED,
                f"{patch.name} cannot be applied: the files that it and the earlier changes replace total more than "
                f"{limit}; raise vm.disk (up to 32G).",
            )
    # Only packs are copied into the workspace's git directory.
    revisions = _memory_file(f"{commit}\n^{base}\n".encode())
    await run("pack-objects", "--quiet", "--revs", "objects/pack/pack", stdin=revisions)
    await run("prune-packed", "--quiet")
    return commit


def _measure_loose_objects(repository: Path) -> int:
    """Return the disk space that objects outside packs use, in bytes. Raises OSError."""
    size = 0
    with RootedFiles(repository) as files:
        for directory in files.entries(b"objects"):
            if len(directory.name) == _LOOSE_DIRECTORY_CHARACTERS and directory.is_directory:
                with files.open_directory(directory.path) as opened, os.scandir(opened) as objects:
                    size += sum(one.stat(follow_symlinks=False).st_blocks * 512 for one in objects)
    return size


async def _commit_patch(run: Callable[..., Awaitable[bytes]], base: str, patch: PatchToCommit) -> str:
    """Apply the patch to the index, which contains `base`, and commit the index."""
    try:
        with patch.open() as file:
            await run("apply", "--cached", "--whitespace=nowarn", "-", stdin=file)
    except GitError as error:
        if error.is_inconclusive:
            raise
        stderr = replace_unprintable(error.stderr.strip().replace("error: ", ""), escape_character)[
            :_STDERR_CHARACTERS_MAX
        ]
        message = f"{patch.name} does not apply to commit {base[:12]}: {stderr or 'git failed'}."
        raise AttemptError(FailureCode.CLONE_FAILED, message) from None
    tree = _parse_object_id(await run("write-tree"))
    text = f"tree {tree}\nparent {base}\nauthor {_IDENTITY}\ncommitter {_IDENTITY}\n\n{patch.message}\n"
    return _parse_object_id(
        await run("hash-object", "-t", "commit", "-w", "--stdin", stdin=_memory_file(text.encode()))
    )


def _parse_object_id(output: bytes) -> str:
    object_id = output.decode(errors="replace").strip()
    if not OBJECT_ID.fullmatch(object_id):
        raise GitError(0, b"fatal: git printed no valid object id")
    return object_id


def _memory_file(data: bytes) -> IO[bytes]:
    """Return a memfd with this content, positioned at its start."""
    file = os.fdopen(os.memfd_create("sent"), "w+b")
    file.write(data)
    file.seek(0)
    return file
