"""Work that came with the manifest: a patch that becomes a commit upon the one that was cloned.

A commit and not a changed work tree: what the task is compared with afterwards is that commit, so that its own patch
has the agent's changes and nothing else. Git is confined and sees no work tree, so no path of a patch leads anywhere.
"""

import base64
import os
from functools import partial
from pathlib import Path
from typing import IO

from sandbox.contracts.confinement import Confinement
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.printable import escaped, printable
from sandbox.workspace.git import Git, GitError
from sandbox.workspace.git_directory import OBJECT_ID

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
