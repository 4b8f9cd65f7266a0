"""The exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command ends with. Stable: scripts branch on these numbers."""

    DONE = 0
    TASK_FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    REFUSED = 5
    UNREACHABLE = 6
    WAIT_TIMEOUT = 7
    TASK_CANCELLED = 8
    INVALID_MANIFEST = 9
    SERVER_ERROR = 10
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_OF_STATE = {"completed": ExitCode.DONE, "cancelled": ExitCode.TASK_CANCELLED}


_OF_ERROR = {
    "backup_exists": ExitCode.CONFLICT,
    "data_dir_busy": ExitCode.CONFLICT,
    "data_dir_not_empty": ExitCode.CONFLICT,
    "no_data": ExitCode.NOT_FOUND,
    "unsafe_place": ExitCode.USAGE,
}


def of_error(error_code: str) -> ExitCode:
    """The code for what failed on this machine, by the stable code of its error."""
    return _OF_ERROR.get(error_code, ExitCode.SERVER_ERROR)


def of_final_state(state: str) -> ExitCode:
    """The code for a task that ended in `state`."""
    return _OF_STATE.get(state, ExitCode.TASK_FAILED)


def of_client_error(error: Exception) -> ExitCode:
    """The code for a call that failed."""
    from sandbox import client

    for family, code in (
        (client.UnreachableError, ExitCode.UNREACHABLE),
        (client.InvalidManifestError, ExitCode.INVALID_MANIFEST),
        (client.NotFoundError, ExitCode.NOT_FOUND),
        (client.ConflictError, ExitCode.CONFLICT),
        (client.AccessError, ExitCode.REFUSED),
        (client.InvalidRequestError, ExitCode.USAGE),
    ):
        if isinstance(error, family):
            return code
    return ExitCode.SERVER_ERROR
