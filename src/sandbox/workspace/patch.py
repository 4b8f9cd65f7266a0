"""The patch: what the agent changed, written by the host's git from the host's own repository.

Git never sees the workspace. The difference between workspace and base commit is found here, told to git as a new tree,
and git compares the two trees. So no configuration, attribute, hook or filter of the agent's can act, and the
bytes in the patch are the bytes in the files.
"""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import PATCH_BYTES_MAX
from sandbox.workspace.base_tree import BaseTree, read_base_tree
from sandbox.workspace.comparison import Comparison
from sandbox.workspace.complaint import last_line
from sandbox.workspace.files import ENTRIES_MAX, Files, TooManyEntriesError
from sandbox.workspace.git import MEMORY_BYTES_MAX, Git, GitError
from sandbox.workspace.ignore_rules import IgnoreRules, lay_out_ignore_files
from sandbox.workspace.new_file import create, flush
from sandbox.workspace.new_tree import NEW_TREE_REF, NewTree
from sandbox.workspace.pipes import pipe, run_with_thread
from sandbox.workspace.stoppable import Stop, run_in_thread
from sandbox.workspace.visible_path import show

_LEFT_OUT_SHOWN_MAX = 20


async def write_patch(git: Git, attempt: AttemptLayout, base_commit: str, target: Path) -> None:
    """Write the patch to `target`, flushed; an empty file when nothing was changed. Raises AttemptError."""
    try:
        base = await read_base_tree(git, attempt.repository, base_commit)
        left_out = await _build_new_tree(git, attempt, base, base_commit)
        await _write_difference(git, attempt.repository, base_commit, target, left_out)
    except TooManyEntriesError:
        raise _failed(f"there are more than {ENTRIES_MAX} files that are not ignored") from None
    except GitError as error:
        raise _failed(_reason(error)) from error
    except OSError as error:
        raise _failed(error.strerror or str(error)) from error


async def _build_new_tree(git: Git, attempt: AttemptLayout, base: BaseTree, base_commit: str) -> Sequence[bytes]:
    """Put the agent's tree into the host's repository; gives the paths that could not be put there."""
    repository = attempt.repository
    rules_directory = repository / "ignore-rules"
    await lay_out_ignore_files(git, repository, base.ignore_files, rules_directory)
    with pipe() as (told, telling), pipe() as (asked, asking), pipe() as (answers, answering):

        def work(stop: Stop) -> Sequence[bytes]:
            with Files(attempt.workspace) as files, asking:
                rules = IgnoreRules(rules_directory, asking, answers)
                tree = NewTree(files, telling, stop)
                tree.begin(base_commit)
                comparison = Comparison(files, base, rules, tree, stop)
                comparison.run()
                tree.end()
                return comparison.left_out

        left_out = await run_with_thread(
            work,
            git.run(
                *(f"--git-dir={repository}", "-c", "fastimport.unpackLimit=0", "-c", "core.compression=1"),
                *("fast-import", "--quiet", "--force"),
                directory=repository,
                stdin=told,
            ),
            git.run(
                *(f"--git-dir={repository}", "--work-tree=."),
                *("check-ignore", "--no-index", "--stdin", "-z", "--verbose", "--non-matching"),
                directory=rules_directory,
                stdin=asked,
                stdout=answering,
                good_codes=(0, 1),
            ),
        )
    await run_in_thread(lambda _: shutil.rmtree(rules_directory))
    return sorted(left_out)


async def _write_difference(
    git: Git, repository: Path, base_commit: str, target: Path, left_out: Sequence[bytes]
) -> None:
    try:
        with create(target) as file:
            file.write(_preamble(left_out))
            file.flush()
            await git.run(
                *(f"--git-dir={repository}", "diff-tree", "-r", "--patch", "--binary", "--full-index"),
                *("--find-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--no-relative"),
                *("--src-prefix=a/", "--dst-prefix=b/", "--end-of-options", base_commit, NEW_TREE_REF),
                directory=repository,
                stdout=file,
                file_bytes_max=PATCH_BYTES_MAX,
            )
        await run_in_thread(lambda _: _flush(target))
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _preamble(left_out: Sequence[bytes]) -> bytes:
    """What no patch can carry, said where `git apply` does not look: before the first difference."""
    lines = [f"# left out, git takes no such path: {show(path)}\n" for path in left_out[:_LEFT_OUT_SHOWN_MAX]]
    if len(left_out) > _LEFT_OUT_SHOWN_MAX:
        lines.append(f"# left out as well: {len(left_out) - _LEFT_OUT_SHOWN_MAX} more\n")
    return "".join(lines).encode()


def _flush(target: Path) -> None:
    flush(target)
    flush(target.parent)


def _reason(error: GitError) -> str:
    if error.returncode == -signal.SIGXFSZ:
        return f"it is larger than a patch may be ({PATCH_BYTES_MAX // 1024**2} MiB)"
    if error.is_out_of_memory:
        return (
            f"comparing the files takes git more than {MEMORY_BYTES_MAX // 1024**3} GiB of memory; have large files "
            "that are built or downloaded ignored in .gitignore"
        )
    return f"git said: {last_line(error.complaint)}"


def _failed(reason: str) -> AttemptError:
    return AttemptError(FailureCode.COLLECT_FAILED, f"The patch could not be made: {reason}.")
