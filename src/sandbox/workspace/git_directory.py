"""Git directories that are written by hand, because it is faster than git and because nothing else gets into them.

The workspace has a `.git` of its own: the agent can commit, branch, diff and log, and whatever it does there reaches
nothing of the host's. Objects are copied, not linked: a hard link would let the agent write into the host's
repository.

Attributes are neutral in both git directories: `info/attributes` outranks every `.gitattributes`, and takes text
conversion, `eol`, `ident`, filters and encodings away. Then the bytes in the workspace are the bytes of the blobs, no
program runs at checkout, LFS pointers stay pointers, and the patch can be made from bytes alone.
"""

import shutil
from pathlib import Path

from sandbox.model.manifest import Repository
from sandbox.workspace.stoppable import Stop

NEUTRAL_ATTRIBUTES = "* -text !eol !crlf -ident !filter !working-tree-encoding\n"


def neutralise(repository: Path) -> None:
    """Make the host's bare repository blind to attributes.

    Newer versions of git read those of HEAD in a bare repository, so HEAD points to a branch that is never born.
    """
    (repository / "HEAD").write_text("ref: refs/sandbox/unborn\n")
    _write_attributes(repository, NEUTRAL_ATTRIBUTES.replace("\n", " !diff\n"))


def read_branch(repository: Path, branch: str) -> str | None:
    """The commit of the branch in a fresh clone, None where the name is not a branch's."""
    wanted = f"refs/heads/{branch}"
    for line in (repository / "packed-refs").read_text(errors="replace").splitlines():
        object_id, _, name = line.partition(" ")
        if name == wanted:
            return object_id
    return None


def write_git_directory(workspace: Path, source: Path, repository: Repository, commit: str, stop: Stop) -> None:
    """Make the workspace's `.git` from the host's repository, on the branch at `commit`, with nothing checked out."""
    directory = workspace / ".git"
    (directory / "objects" / "info").mkdir(parents=True)
    (directory / "objects" / "pack").mkdir()
    (directory / "refs").mkdir()
    _copy_packs(source / "objects" / "pack", directory / "objects" / "pack", stop)
    if (source / "shallow").exists():
        shutil.copyfile(source / "shallow", directory / "shallow")
    (directory / "config").write_text(_config(repository, commit))
    (directory / "packed-refs").write_text(
        _packed_refs(repository.branch, commit, read_branch(source, repository.branch))
    )
    (directory / "HEAD").write_text(f"ref: refs/heads/{repository.branch}\n")
    _write_attributes(directory, NEUTRAL_ATTRIBUTES)


def _write_attributes(directory: Path, attributes: str) -> None:
    (directory / "info").mkdir(exist_ok=True)
    (directory / "info" / "attributes").write_text(attributes)


def _copy_packs(source: Path, target: Path, stop: Stop) -> None:
    for pack in sorted(source.iterdir()):
        if pack.suffix in {".pack", ".idx", ".rev"}:
            stop.check()
            shutil.copyfile(pack, target / pack.name)


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
    """A value or a subsection of a git configuration."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _packed_refs(branch: str, commit: str, tip: str | None) -> str:
    lines = {f"refs/heads/{branch}": commit, f"refs/remotes/origin/{branch}": tip or commit}
    body = "".join(f"{object_id} {name}\n" for name, object_id in sorted(lines.items()))
    return f"# pack-refs with: peeled fully-peeled sorted \n{body}"
