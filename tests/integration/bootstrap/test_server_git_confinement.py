"""A server's git confinement: missing programs disable the confinement, but slow probes do not."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from sandbox.bootstrap import local_host
from sandbox.bootstrap.doctor import host_checks
from sandbox.bootstrap.runtime_selection import RuntimeChoice
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.model.failure import AttemptError, FailureCode

AVAILABLE = RuntimeProbe("slow", is_available=True, tier="none", strength=1)


class SlowRuntime:
    """A runtime whose confinements fail with `error`, or exceed their start timeout if `error` is None."""

    def __init__(self, error=None):
        self.error = error

    def prepare(self, attempt_id):
        return SimpleNamespace(attempt_id=attempt_id)

    @asynccontextmanager
    async def confine(self, handle, spec):
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()
        yield

    async def destroy(self, handle, disk):
        pass


@pytest.fixture
def use_runtime(monkeypatch):
    def use(runtime):
        monkeypatch.setattr("sandbox.runtimes.probe._PROBE_SECONDS", 0.1)
        for module in (local_host, host_checks):
            monkeypatch.setattr(module, "make_runtime", lambda *_, **__: runtime)

    return use


def missing_bubblewrap():
    return SlowRuntime(AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing"))


def can_confine(tmp_path, probe=AVAILABLE):
    return asyncio.run(local_host.can_confine_git(RuntimeChoice(probe, [probe]), tmp_path))


def test_slow_start_keeps_git_confined(tmp_path, use_runtime, caplog):
    use_runtime(SlowRuntime())
    assert can_confine(tmp_path)
    assert "did not exit within" in caplog.text


def test_missing_bubblewrap_leaves_git_unconfined(tmp_path, use_runtime, caplog):
    use_runtime(missing_bubblewrap())
    assert not can_confine(tmp_path)
    assert "bubblewrap is missing" in caplog.text


@pytest.mark.parametrize(("runtime", "is_confined"), [(SlowRuntime(), True), (missing_bubblewrap(), False)])
def test_git_confinement_does_not_need_a_working_sandbox(tmp_path, use_runtime, runtime, is_confined):
    """Without a working sandbox, finishers of earlier attempts still read workspaces with git."""
    use_runtime(runtime)
    assert can_confine(tmp_path, RuntimeProbe("slow", is_available=False, tier="none", strength=1)) is is_confined


@pytest.mark.parametrize(
    ("runtime", "message"),
    [(SlowRuntime(), "still confines it"), (missing_bubblewrap(), "with the server's privileges")],
)
def test_doctor_reports_the_git_confinement_of_the_server(tmp_path, use_runtime, monkeypatch, runtime, message):
    async def choose(*_):
        return RuntimeChoice(AVAILABLE, [AVAILABLE])

    monkeypatch.setattr(host_checks, "choose_runtime", choose)
    use_runtime(runtime)
    [git] = [finding for finding in host_checks.check_runtimes("slow", tmp_path) if finding.name == "git"]
    assert message in git.message
    assert not git.ok
