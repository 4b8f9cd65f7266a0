"""A failed probe is final only if this process or machine type can never use the runtime."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from sandbox.runtimes.bubblewrap import runtime as bubblewrap
from sandbox.runtimes.gvisor import runtime as gvisor
from sandbox.runtimes.qemu import runtime as qemu


@pytest.fixture
def set_machine(monkeypatch):
    """Return a function that sets the uid and the machine type."""

    def apply(uid=0, machine="x86_64"):
        monkeypatch.setattr(os, "getuid", lambda: uid)
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))

    return apply


def probe_bubblewrap():
    return asyncio.run(bubblewrap.probe_bubblewrap(None, None, None))


def probe_gvisor():
    return asyncio.run(gvisor.probe_gvisor(None, None, None))


def probe_qemu():
    return asyncio.run(qemu.probe_qemu(None, None, None, excludes_emulation=False))


@pytest.mark.parametrize(
    ("probe", "environment"),
    [
        (probe_bubblewrap, {"machine": "riscv64"}),
        (probe_gvisor, {"uid": 1000}),
        (probe_qemu, {"uid": 1000}),
        (probe_qemu, {"machine": "aarch64"}),
    ],
)
def test_permanent_failure_is_reported(set_machine, probe, environment):
    set_machine(**environment)
    result = probe()
    assert (result.is_available, result.is_permanent) == (False, True)


@pytest.mark.parametrize(
    ("module", "finder", "probe"),
    [(bubblewrap, "find_bwrap", probe_bubblewrap), (gvisor, "find_runsc", probe_gvisor)],
)
def test_missing_program_is_not_final(set_machine, monkeypatch, module, finder, probe):
    set_machine()
    monkeypatch.setattr(module, finder, lambda: None)
    result = probe()
    assert (result.is_available, result.is_permanent) == (False, False)


@pytest.mark.parametrize("error", [TimeoutError("busy"), OSError("process limit reached")])
def test_failure_of_the_probe_sandbox_is_not_final(set_machine, monkeypatch, error):
    set_machine()

    async def fail(*_, **__):
        raise error

    for module, finder, probe in (
        (bubblewrap, "find_bwrap", probe_bubblewrap),
        (gvisor, "find_runsc", probe_gvisor),
    ):
        monkeypatch.setattr(module, "run_probe", fail)
        monkeypatch.setattr(module, finder, lambda: "/usr/bin/true")
        result = probe()
        assert (result.is_available, result.is_permanent) == (False, False)
