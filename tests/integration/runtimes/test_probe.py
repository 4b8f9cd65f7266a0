"""A probe explains in complete sentences why a runtime is unusable."""

import asyncio
import errno
from types import SimpleNamespace

import pytest

from sandbox.interfaces.runtime import ConfinementLostError, ExitStatus
from sandbox.model.errors import SandboxError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.bubblewrap.runtime import probe_bubblewrap
from sandbox.runtimes.probe import InconclusiveProbeError, find_confinement_problem, run_probe


class FailingRuntime:
    """A runtime whose programs end with `exit_status`, or never end if `exit_status` is None.

    The same object acts as the runtime's sandboxes and control groups.
    """

    def __init__(self, exit_status: ExitStatus | None, stderr: bytes = b"") -> None:
        self.exit_status, self.stderr = exit_status, stderr

    def prepare(self, attempt_id):
        return SimpleNamespace(attempt_id=attempt_id)

    async def create(self, handle, spec):
        return self

    async def destroy(self, handle, disk):
        pass

    async def start(self, command):
        async def read(size):
            return self.stderr

        return None, SimpleNamespace(read=read)

    async def wait(self):
        if self.exit_status is None:
            await asyncio.Event().wait()
        return self.exit_status

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
    ("exit_status", "stderr", "message"),
    [
        (ExitStatus(1), b"no room\n", "'true' exited with code 1 in a sandbox: no room."),
        (ExitStatus(137), b"", "'true' exited with code 137 in a sandbox."),
        (
            ExitStatus(None),
            b"bwrap: gone.\n",
            "'true' did not exit before its sandbox ended: bwrap: gone.",
        ),
        (None, b"", "The program 'true' did not exit within 0.1 s in a sandbox."),
    ],
)
async def test_exit_of_the_probe_program_is_described_in_a_sentence(tmp_path, set_load, exit_status, stderr, message):
    set_load(0)
    runtime = FailingRuntime(exit_status, stderr)
    with pytest.raises((SandboxError, TimeoutError)) as caught:
        await run_probe(runtime, tmp_path, runtime, memory_bytes=1, timeout_seconds=0.1)
    assert str(caught.value) == message


class HangingFirstRuntime(FailingRuntime):
    """A runtime whose programs end, except in the first `hanging_count` sandboxes."""

    def __init__(self, hanging_count: int) -> None:
        super().__init__(ExitStatus(0))
        self.hanging_count = hanging_count

    async def create(self, handle, spec):
        self.hanging_count -= 1
        self.exit_status = None if self.hanging_count >= 0 else ExitStatus(0)
        return self


@pytest.fixture
def set_load(monkeypatch):
    """Return a function that sets the load average of a machine with two CPUs."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    return lambda average: monkeypatch.setattr("os.getloadavg", lambda: (average, 0, 0))


async def test_probe_on_a_busy_machine_is_repeated_with_more_time(tmp_path, set_load):
    set_load(3)
    runtime = HangingFirstRuntime(1)
    assert await run_probe(runtime, tmp_path, runtime, memory_bytes=1, timeout_seconds=0.1) == frozenset()
    with pytest.raises(TimeoutError, match=r"within 0\.4 s"):
        await run_probe(HangingFirstRuntime(2), tmp_path, runtime, memory_bytes=1, timeout_seconds=0.1)


async def test_probe_on_an_idle_machine_is_not_repeated(tmp_path, set_load):
    set_load(2)
    runtime = HangingFirstRuntime(1)
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        await run_probe(runtime, tmp_path, runtime, memory_bytes=1, timeout_seconds=0.1)


def test_bubblewrap_remedy_consists_of_sentences(tmp_path):
    runtime = FailingRuntime(ExitStatus(1))
    remedy = asyncio.run(probe_bubblewrap(runtime, tmp_path, runtime)).remedy
    assert remedy.startswith(("'true' exited with code 1 in a sandbox. User", "The kernel does not allow users"))
    runtime.create = None  # error messages of the operating system have no full stop
    runtime.prepare = lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    assert "error. User namespaces" in asyncio.run(probe_bubblewrap(runtime, tmp_path, runtime)).remedy


class FailingFirstRuntime(FailingRuntime):
    """A runtime whose first confined programs raise the given error, exit with the given status, or hang (None)."""

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
def _short_timeout(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.probe._PROBE_SECONDS", 0.1)


@pytest.mark.usefixtures("_short_timeout")
@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (FailingRuntime(ExitStatus(0)), None),
        (FailingRuntime(ExitStatus(2)), "git exited with code 2"),
        (FailingFirstRuntime(MISSING, MISSING), "bubblewrap is missing."),
        (FailingFirstRuntime(NO_NAMESPACES, NO_NAMESPACES), "[Errno 1] no namespaces"),
        (FailingFirstRuntime(None, MISSING), "bubblewrap is missing."),
    ],
)
async def test_confinement_problem_is_described(tmp_path, runtime, message):
    assert (await find_confinement_problem(runtime, tmp_path)) == message


@pytest.mark.usefixtures("_short_timeout")
@pytest.mark.parametrize(
    "error", [None, NO_MEMORY, no_process(), KILLED, ConfinementLostError("it is gone"), ExitStatus(1), ExitStatus(137)]
)
async def test_transient_error_is_not_a_confinement_problem(tmp_path, error):
    assert (await find_confinement_problem(FailingFirstRuntime(error), tmp_path)) is None


@pytest.mark.usefixtures("_short_timeout")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "git did not exit within"),
        (NO_MEMORY, "Cannot allocate memory"),
        (no_process(), "Programs could not be confined"),
        (KILLED, "ended by signal 9"),
        (ExitStatus(137), "git was killed by signal 9"),
    ],
)
async def test_persistent_lack_of_resources_raises_machine_busy(tmp_path, error, message):
    with pytest.raises(InconclusiveProbeError, match=message):
        await find_confinement_problem(FailingFirstRuntime(error, error), tmp_path)
