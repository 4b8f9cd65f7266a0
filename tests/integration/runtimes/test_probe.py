"""What is told of a runtime that does not work, in words that make a sentence."""

import asyncio
import errno
from types import SimpleNamespace

import pytest

from sandbox.interfaces.runtime import ConfinementLostError, ExitStatus
from sandbox.model.errors import AttemptError, FailureCode, SandboxError
from sandbox.runtimes.bubblewrap.runtime import probe_bubblewrap
from sandbox.runtimes.probe import MachineBusyError, find_confinement_problem, run_probe


class Failing:
    """A runtime whose programs end as `exit_` says, or never; it is its sandboxes and its control groups, too."""

    def __init__(self, exit_: ExitStatus | None, said: bytes = b"") -> None:
        self.exit_, self.said = exit_, said

    def prepare(self, attempt_id):
        return SimpleNamespace(attempt_id=attempt_id)

    async def create(self, handle, spec):
        return self

    async def destroy(self, handle, disk):
        pass

    async def start(self, command):
        async def read(size):
            return self.said

        return None, SimpleNamespace(read=read)

    async def wait(self):
        if self.exit_ is None:
            await asyncio.Event().wait()
        return self.exit_

    def confine(self, handle, spec):
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def run(self, command):
        return (await self.wait()).code

    def group(self, attempt_id):
        return SimpleNamespace(limits=frozenset)


@pytest.mark.parametrize(
    ("exit_", "said", "told"),
    [
        (ExitStatus(1), b"no room\n", "'true' ended in a sandbox with exit code 1: no room."),
        (ExitStatus(137), b"", "'true' ended in a sandbox with exit code 137."),
        (
            ExitStatus(None),
            b"bwrap: gone.\n",
            "'true' did not end in a sandbox, which was gone before it: bwrap: gone.",
        ),
        (None, b"", "'true' did not end in a sandbox within 0.1 s."),
    ],
)
def test_how_the_first_program_ended_is_a_sentence(tmp_path, exit_, said, told):
    runtime = Failing(exit_, said)
    with pytest.raises((SandboxError, TimeoutError)) as caught:
        asyncio.run(run_probe(runtime, tmp_path, runtime, memory_bytes=1, within_seconds=0.1))
    assert str(caught.value) == told


def test_what_keeps_bubblewrap_from_working_stands_in_whole_sentences(tmp_path):
    runtime = Failing(ExitStatus(1))
    mend = asyncio.run(probe_bubblewrap(runtime, tmp_path, runtime)).remedy
    assert mend.startswith(("'true' ended in a sandbox with exit code 1. User", "The kernel does not let users"))
    runtime.create = None  # something else than this house's own errors: no full stop
    runtime.prepare = lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    assert "error. User namespaces" in asyncio.run(probe_bubblewrap(runtime, tmp_path, runtime)).remedy


class FailingAtFirst(Failing):
    """One whose first tries to confine raise these, or end so; None is one that never ends."""

    def __init__(self, *errors: Exception | ExitStatus | None) -> None:
        super().__init__(ExitStatus(0))
        self.errors = list(errors)

    async def run(self, command):
        if not self.errors:
            return 0
        error = self.errors.pop(0)
        if error is None:
            await asyncio.Event().wait()
        if isinstance(error, ExitStatus):
            return error.code
        raise error


MISSING = AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing.")
KILLED = AttemptError(FailureCode.SANDBOX_LOST, "It was ended by signal 9.")
NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")
NO_NAMESPACES = PermissionError(errno.EPERM, "no namespaces")


def no_process():
    error = AttemptError(FailureCode.PROVISION_FAILED, "Programs could not be confined.")
    error.__cause__ = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return error


@pytest.fixture
def _is_impatient(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.probe._PROBE_SECONDS", 0.1)


@pytest.mark.usefixtures("_is_impatient")
@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        (Failing(ExitStatus(0)), None),
        (Failing(ExitStatus(2)), "git ended with exit code 2"),
        (FailingAtFirst(MISSING, MISSING), "bubblewrap is missing."),
        (FailingAtFirst(NO_NAMESPACES, NO_NAMESPACES), "[Errno 1] no namespaces"),
        (FailingAtFirst(None, MISSING), "bubblewrap is missing."),
    ],
)
def test_why_git_is_not_confined_is_told_in_words(tmp_path, runtime, told):
    assert asyncio.run(find_confinement_problem(runtime, tmp_path)) == told


@pytest.mark.usefixtures("_is_impatient")
@pytest.mark.parametrize(
    "error", [None, NO_MEMORY, no_process(), KILLED, ConfinementLostError("it is gone"), ExitStatus(1), ExitStatus(137)]
)
def test_a_machine_that_is_busy_for_a_moment_is_no_reason_not_to_confine(tmp_path, error):
    assert asyncio.run(find_confinement_problem(FailingAtFirst(error), tmp_path)) is None


@pytest.mark.usefixtures("_is_impatient")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, "git did not end within"),
        (NO_MEMORY, "Cannot allocate memory"),
        (no_process(), "Programs could not be confined"),
        (KILLED, "ended by signal 9"),
        (ExitStatus(137), "git was ended by signal 9"),
    ],
)
def test_of_a_machine_that_stays_busy_nothing_is_concluded(tmp_path, error, told):
    with pytest.raises(MachineBusyError, match=told):
        asyncio.run(find_confinement_problem(FailingAtFirst(error, error), tmp_path))
