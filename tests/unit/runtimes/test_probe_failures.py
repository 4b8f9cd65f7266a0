"""Which failed probes are worth another one: all but those that tell of the process itself or of the machine's kind."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from sandbox.runtimes.bubblewrap import runtime as bubblewrap
from sandbox.runtimes.gvisor import runtime as gvisor
from sandbox.runtimes.qemu import runtime as qemu


@pytest.fixture
def here(monkeypatch):
    """Lets the process and its machine be such."""

    def be(uid=0, machine="x86_64"):
        monkeypatch.setattr(os, "getuid", lambda: uid)
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))

    return be


def probe_bubblewrap():
    return asyncio.run(bubblewrap.probe_bubblewrap(None, None, None))


def probe_gvisor():
    return asyncio.run(gvisor.probe_gvisor(None, None, None))


def probe_qemu():
    return asyncio.run(qemu.probe_qemu(None, None, None, only_kvm=False))


@pytest.mark.parametrize(
    ("probe", "place"),
    [
        (probe_bubblewrap, {"machine": "riscv64"}),
        (probe_gvisor, {"uid": 1000}),
        (probe_qemu, {"uid": 1000}),
        (probe_qemu, {"machine": "aarch64"}),
    ],
)
def test_what_no_later_probe_changes_is_final(here, probe, place):
    here(**place)
    found = probe()
    assert (found.is_available, found.is_final) == (False, True)


@pytest.mark.parametrize(
    ("room", "finder", "probe"),
    [(bubblewrap, "find_bwrap", probe_bubblewrap), (gvisor, "find_runsc", probe_gvisor)],
)
def test_a_program_that_is_missing_may_be_installed(here, monkeypatch, room, finder, probe):
    here()
    monkeypatch.setattr(room, finder, lambda: None)
    found = probe()
    assert (found.is_available, found.is_final) == (False, False)


@pytest.mark.parametrize("error", [TimeoutError("busy"), OSError("no more processes")])
def test_what_was_tried_and_failed_may_work_later(here, monkeypatch, error):
    here()

    async def fail(*_, **__):
        raise error

    for room, finder, probe in (
        (bubblewrap, "find_bwrap", probe_bubblewrap),
        (gvisor, "find_runsc", probe_gvisor),
    ):
        monkeypatch.setattr(room, "run_probe", fail)
        monkeypatch.setattr(room, finder, lambda: "/usr/bin/true")
        found = probe()
        assert (found.is_available, found.is_final) == (False, False)
