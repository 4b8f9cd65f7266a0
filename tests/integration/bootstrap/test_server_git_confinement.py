"""Whether a server's git is confined: only what is missing on a machine speaks against it, and no bad moment."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from sandbox.bootstrap import server
from sandbox.bootstrap.doctor import findings
from sandbox.bootstrap.runtime import RuntimeChoice
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.model.errors import AttemptError, FailureCode

WORKS = RuntimeProbe("slow", is_available=True, tier="none", strength=1)


class Slow:
    """Its confinements begin when nobody waits for them any more, or `error` says why they never do."""

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
def offers(monkeypatch):
    def offer(runtime):
        monkeypatch.setattr("sandbox.runtimes.probe._PROBE_SECONDS", 0.1)
        for room in (server, findings):
            monkeypatch.setattr(room, "make_runtime", lambda *_, **__: runtime)

    return offer


def missing():
    return Slow(AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing"))


def confines(tmp_path, probe=WORKS):
    return asyncio.run(server.can_confine_git(RuntimeChoice(probe, [probe]), tmp_path))


def test_a_slow_start_costs_no_confinement(tmp_path, offers, caplog):
    offers(Slow())
    assert confines(tmp_path)
    assert "did not end within" in caplog.text


def test_where_bubblewrap_is_missing_git_runs_as_it_is(tmp_path, offers, caplog):
    offers(missing())
    assert not confines(tmp_path)
    assert "bubblewrap is missing" in caplog.text


@pytest.mark.parametrize(("runtime", "is_confined"), [(Slow(), True), (missing(), False)])
def test_git_may_be_confined_where_no_sandbox_can_be_made(tmp_path, offers, runtime, is_confined):
    """A finisher of an earlier attempt reads its workspace there too."""
    offers(runtime)
    assert confines(tmp_path, RuntimeProbe("slow", is_available=False, tier="none", strength=1)) is is_confined


@pytest.mark.parametrize(
    ("runtime", "told"), [(Slow(), "confines it all the same"), (missing(), "with the server's rights")]
)
def test_the_doctor_says_what_a_server_would_do(tmp_path, offers, monkeypatch, runtime, told):
    async def choose(*_):
        return RuntimeChoice(WORKS, [WORKS])

    monkeypatch.setattr(findings, "choose_runtime", choose)
    offers(runtime)
    [git] = [one for one in findings.check_runtimes("slow", tmp_path) if one.name == "git"]
    assert told in git.message
    assert not git.ok
