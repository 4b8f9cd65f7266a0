"""The changed files themselves, written for a patch that does not hold them."""

from pathlib import Path

from sandbox.contracts.layout import AttemptLayout
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import ARTIFACT_BYTES_MAX
from sandbox.workspace.base_tree import read_base_tree
from sandbox.workspace.changes_tar import ChangesTar
from sandbox.workspace.comparing import compare
from sandbox.workspace.complaint import last_line
from sandbox.workspace.files import Files, TooManyEntriesError
from sandbox.workspace.git import Git, GitError
from sandbox.workspace.new_file import create, flush, removing_unless_done
from sandbox.workspace.stoppable import Stop, run_in_thread


async def write_changed_files(git: Git, attempt: AttemptLayout, base_commit: str, target: Path) -> str | None:
    """Write the tar, flushed and whole, up to half of what the files that match may be. Raises AttemptError.

    Gives why not every changed file is in it.
    """
    try:
        return await _write(git, attempt, base_commit, target)
    except GitError as error:
        raise _failed(f"git said: {last_line(error.complaint)}") from error
    except OSError as error:
        raise _failed(error.strerror or str(error)) from error


async def _write(git: Git, attempt: AttemptLayout, base_commit: str, target: Path) -> str | None:
    base = await read_base_tree(git, attempt.repository, base_commit)
    reason = None
    with removing_unless_done(target):
        with create(target) as file:
            tar = ChangesTar(file, ARTIFACT_BYTES_MAX // 2)

            def begin(files: Files, stop: Stop) -> ChangesTar:
                return tar.read_from(files, stop)

            try:
                await compare(git, attempt, base, begin, lambda _: None)
            except TooManyEntriesError as error:
                reason = f"there are {error}, and only the first were looked at"
            await run_in_thread(lambda _: tar.close())
        await run_in_thread(lambda _: flush(target))
    if tar.left_out:
        reason = f"{tar.left_out} files would have made it larger than {ARTIFACT_BYTES_MAX // 2 // 1024**2} MiB"
    return reason


def _failed(reason: str) -> AttemptError:
    return AttemptError(FailureCode.COLLECT_FAILED, f"The changed files could not be kept: {reason}.")
