"""A runtime that has worked is used until the server stops, and can be probed again."""

from types import SimpleNamespace

import pytest
from msgspec import structs

from sandbox.bootstrap import local_host, runtime_selection
from sandbox.bootstrap.local_host import AgentsAndCommands, LocalHost, PlacementContext
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.interfaces.runtime import RuntimeProbe

GVISOR = RuntimeProbe("gvisor", is_available=True, tier="gvisor", strength=20, remedy="Install runsc.")
BUBBLEWRAP = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)


@pytest.fixture
def probes(monkeypatch):
    """The result of each runtime's next probe. Tests change these results."""
    results = {"gvisor": GVISOR, "bubblewrap": BUBBLEWRAP}
    results["made"] = []

    def make(name):
        async def probe():
            return results[name]

        def make_one(_, excludes_emulation):
            results["made"].append((name, excludes_emulation))
            return SimpleNamespace(probe=probe)

        return make_one

    async def confine(*_):
        return True

    monkeypatch.setattr(runtime_selection, "_MAKERS", {name: make(name) for name in ("gvisor", "bubblewrap")})
    monkeypatch.setattr(local_host, "can_confine_git", confine)
    return results


@pytest.fixture
def host(tmp_path, monkeypatch):
    async def find_no_problem(_):
        return None

    monkeypatch.setattr(local_host, "loop_unavailable_reason", find_no_problem)
    (tmp_path / "run").mkdir()
    context = PlacementContext(tmp_path, tmp_path / "run", ServerSettings(), AgentsAndCommands({}), None)
    return LocalHost(context, {})


async def test_failure_of_the_runtime_in_use_does_not_select_a_weaker_one(probes, host):
    first = await host.probe()
    settings = host.runner_settings()
    assert (first.runtime, first.failure) == ("gvisor", None)
    probes["gvisor"] = structs.replace(GVISOR, is_available=False)
    second = await host.probe()
    assert (second.runtime, second.tier) == ("gvisor", "gvisor")
    assert second.failure == "The runtime gvisor does not work here. Install runsc."
    assert [(probe.runtime, probe.is_available) for probe in second.probes] == [("gvisor", False), ("bubblewrap", True)]
    assert host.runner_settings() is settings
    probes["gvisor"] = GVISOR
    assert await host.probe() == first


async def test_only_the_runtime_in_use_is_probed_again(probes, host):
    await host.probe()
    probes["made"].clear()
    await host.probe()
    assert probes["made"] == [("gvisor", True)]


async def test_all_runtimes_are_probed_until_one_works(probes, host):
    probes["gvisor"] = structs.replace(GVISOR, is_available=False)
    probes["bubblewrap"] = structs.replace(BUBBLEWRAP, is_available=False)
    assert (await host.probe()).failure is not None
    probes["bubblewrap"] = BUBBLEWRAP
    assert (await host.probe()).runtime == "bubblewrap"
