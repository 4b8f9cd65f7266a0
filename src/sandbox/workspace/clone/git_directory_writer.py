"""Writes git directories without running git. This is faster, and the directories contain nothing unexpected.

The workspace has its own `.git`: the agent can commit, branch, diff and log, and none of this affects the host. A
remote may have compromised the git process that wrote the host's repository, so links in the repository are never
followed. Objects are copied, not linked: a hard link would let the agent write into the host's repository.

Attributes are neutral in both git directories: `info/attributes` outranks every `.gitattributes` and disables text
conversion, `eol`, `ident`, filters and encodings. As a result, the files in the workspace have exactly the bytes of the
blobs, and the patch can be computed from bytes alone. No program runs at checkout, and LFS pointers remain pointers.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from sandbox.model.manifest.schema import Repository
from sandbox.workspace.cancellable_thread import StopFlag
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
