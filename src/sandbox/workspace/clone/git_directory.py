"""The git directory of a workspace: writes it without git, and commits patches on top of the base commit.

The workspace has its own `.git`: the agent can commit, branch, diff and log, and none of this affects the host. A
remote may have compromised the git process that wrote the host's repository, so links in the repository are never
followed. Objects are copied, not linked: a hard link would let the agent write into the host's repository.

Attributes are neutral in both git directories: `info/attributes` outranks every `.gitattributes` and disables text
conversion, `eol`, `ident`, filters and encodings. As a result, the files in the workspace have exactly the bytes of the
blobs, and the patch can be computed from bytes alone. No program runs at checkout, and LFS pointers remain pointers.
"""

import base64
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.interfaces.runtime import Confinement
from sandbox.model.display_text import escape_character, replace_unprintable
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.manifest.schema import Repository
from sandbox.primitives.concurrency import StopFlag, run_in_thread
from sandbox.workspace.git_command import Git, GitError
from sandbox.workspace.rooted_files import RootedFiles, read_chunks

OBJECT_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REFS_BYTES_MAX = 1024 * 1024
NEUTRAL_ATTRIBUTES = "* -text !eol !crlf -ident !filter !working-tree-encoding\n"


def neutralize_attributes(repository: Path) -> None:
    """Disable attributes in the host's bare repository.

    In a bare repository, newer versions of git read the attributes of HEAD, so HEAD points to a branch that never
    exists.
    """
    with RootedFiles(repository) as files:
        _replace_file(files, b"", "HEAD", "ref: refs/sandbox/unborn\n")
        with files.open_directory(b"") as directory, suppress(FileExistsError):
            os.mkdir("info", dir_fd=directory)
        with files.open_directory(b"info") as directory:
            os.fchmod(directory, 0o755)
        _replace_file(files, b"info", "attributes", NEUTRAL_ATTRIBUTES.replace("\n", " !diff\n"))


def read_branch_commit(repository: Path, branch: str) -> str | None:
    """Return the branch's commit in a fresh clone; None if there is no such branch."""
    reference = f"refs/heads/{branch}"
    with RootedFiles(repository) as files, files.open_file(b"packed-refs") as (file, size):
        text = os.read(file, min(size, _REFS_BYTES_MAX)).decode(errors="replace")
    for line in text.splitlines():
        object_id, _, name = line.partition(" ")
        if name == reference and OBJECT_ID.fullmatch(object_id):
            return object_id
    return None


def write_git_directory(workspace: Path, source: Path, repository: Repository, commit: str, stop: StopFlag) -> None:
    """Create the workspace's `.git` from the host's git directory `source`. No file is checked out.

    HEAD is the repository's branch, at `commit`.
    """
    directory = workspace / ".git"
    (directory / "objects" / "info").mkdir(parents=True)
    (directory / "objects" / "pack").mkdir()
    (directory / "refs").mkdir()
    with RootedFiles(source) as files:
        for entry in files.entries(b"objects/pack"):
            if entry.name.endswith((b".pack", b".idx", b".rev")):
                _copy_file(files, entry.path, directory, stop)
        with suppress(FileNotFoundError):
            _copy_file(files, b"shallow", directory, stop)
    (directory / "config").write_text(_config(repository, commit))
    (directory / "packed-refs").write_text(
        _packed_refs(repository.branch, commit, read_branch_commit(source, repository.branch))
    )
    (directory / "HEAD").write_text(f"ref: refs/heads/{repository.branch}\n")
    _write_attributes(directory, NEUTRAL_ATTRIBUTES)


def _write_attributes(directory: Path, attributes: str) -> None:
    (directory / "info").mkdir(exist_ok=True)
    (directory / "info" / "attributes").write_text(attributes)


def _replace_file(files: RootedFiles, parent: bytes, name: str, text: str) -> None:
    """Replace a file without writing through a link. git, which runs with a different uid, can read the new file."""
    with files.open_directory(parent) as directory:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
        with os.fdopen(opened, "w") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)


def _copy_file(files: RootedFiles, path: bytes, target: Path, stop: StopFlag) -> None:
    """Copy a regular file to the same path under `target`."""
    with files.open_file(path) as (file, size), (target / os.fsdecode(path)).open("xb") as copy:
        for chunk in read_chunks(file, size, stop):
            copy.write(chunk)


def _config(repository: Repository, commit: str) -> str:
    branch = _quote(repository.branch)
    sha256 = len(commit) == 64
    return (
        f"[core]\n\trepositoryformatversion = {int(sha256)}\n\tfilemode = true\n\tbare = false\n"
        "\tlogallrefupdates = true\n"
        + ("[extensions]\n\tobjectformat = sha256\n" if sha256 else "")
        + f'[remote "origin"]\n\turl = {_quote(repository.url)}\n'
        f"\tfetch = {_quote(f'+refs/heads/{repository.branch}:refs/remotes/origin/{repository.branch}')}\n"
        f"[branch {branch}]\n\tremote = origin\n\tmerge = {_quote(f'refs/heads/{repository.branch}')}\n"
    )


def _quote(text: str) -> str:
    """Quote a value or a subsection for a git configuration."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _packed_refs(branch: str, commit: str, tip: str | None) -> str:
    lines = {f"refs/heads/{branch}": commit, f"refs/remotes/origin/{branch}": tip or commit}
    body = "".join(f"{object_id} {name}\n" for name, object_id in sorted(lines.items()))
    return f"# pack-refs with: peeled fully-peeled sorted \n{body}"


INITIAL_COMMIT_MESSAGE = "Changes submitted with the task"
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
        shortened = error.stderr.strip().replace("error: ", "")[:_STDERR_CHARACTERS_MAX]
        stderr = replace_unprintable(shortened, escape_character)[:_STDERR_CHARACTERS_MAX]
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
