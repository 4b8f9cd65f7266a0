"""Whether the host's git is confined, which every attempt of a server's is told."""

import logging
from pathlib import Path

from sandbox.runtimes.trying import MachineBusyError, why_not_confined
from sandbox.wiring.runtime import Choice, make_runtime

_log = logging.getLogger(__name__)


async def find_confining(choice: Choice, run_dir: Path) -> bool:
    """Where something is missing for it, which 'sandbox doctor' tells too, git has the server's rights.

    Where the machine is only busy it is confined: an attempt whose confinement then fails ends, and no other does.
    It is tried also where no sandbox can be made: a finisher of an earlier attempt reads its workspace all the same.
    """
    try:
        reason = await why_not_confined(make_runtime(choice.chosen.runtime, run_dir), run_dir)
    except MachineBusyError as busy:
        _log.warning("git runs confined, though trying that failed twice: %s", busy)
        return True
    if reason is not None:
        _log.warning("git runs with the server's rights, since it cannot be confined: %s", reason)
    return reason is None
