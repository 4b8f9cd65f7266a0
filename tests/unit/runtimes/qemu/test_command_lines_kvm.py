"""Guests use KVM if it works, even on a busy machine. Otherwise they are emulated, and the reason is reported."""

import asyncio
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import SandboxSpec
from sandbox.model.failure import AttemptError
from sandbox.runtimes.qemu import guest_components, runtime
from sandbox.runtimes.qemu.command_lines import Accelerator
from sandbox.runtimes.qemu.runtime import (
    KVM_BOOT_SECONDS,
    KVM_BUSY_BOOT_SECONDS,
    KVM_RETRY_BOOT_SECONDS,
    KvmStatus,
    QemuRuntime,
)
from sandbox.runtimes.qemu.sandbox import BootError, QemuSandbox

TIMED_OUT = BootError("not in time", has_timed_out=True)
BROKEN = BootError("no memory for it")
BOOTED = None


class FakeQemuRuntime(QemuRuntime):
    """A runtime with predefined boot outcomes. By default, a guest boots."""

    def __init__(self, tmp_dir, *outcomes, excludes_emulation=False):
        super().__init__(tmp_dir / "run", excludes_emulation=excludes_emulation)
        self.boots = []
        self.outcomes = list(outcomes)

    async def _boot(self, handle, spec, timeout_seconds):
        self.boots.append((self._guest_specs[handle.attempt_id].accelerator, timeout_seconds))
        outcome = self.outcomes.pop(0) if self.outcomes else BOOTED
        if outcome is not BOOTED:
            raise outcome
        sandbox = QemuSandbox.__new__(QemuSandbox)
        sandbox.slow_reason = self._guest_specs[handle.attempt_id].slow_reason
        return sandbox

    def make(self):
        spec = SandboxSpec("abcdefghijkl", Path("/disk"), 1, 1 << 28, 64)
        return asyncio.run(self.create(self._build_handle("abcdefghijkl", None), spec))

    @property
    def accelerators(self):
        return [accelerator for accelerator, _ in self.boots]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """An idle machine with all guest components and /dev/kvm."""
    set_load(monkeypatch, 0)
    found = guest_components.GuestComponents("/v", Path("/k"), [], Path("/py"), Path("/py/bin/python3"))
    monkeypatch.setattr(runtime, "find_components", lambda: found)
    monkeypatch.setattr("os.access", lambda path, mode: path == "/dev/kvm")
    set_kvm_speed(monkeypatch, fails_speed_selftest=False)


def set_load(monkeypatch, average):
    monkeypatch.setattr("os.getloadavg", lambda: (average, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def set_kvm_speed(monkeypatch, *, fails_speed_selftest):
    async def fake_fails_speed_selftest(_):
        return fails_speed_selftest

    monkeypatch.setattr(KvmStatus, "fails_speed_selftest", fake_fails_speed_selftest)


def test_slow_boot_is_retried_with_kvm_and_more_time(tmp_path):
    first = FakeQemuRuntime(tmp_path, TIMED_OUT)
    assert first.make().slow_reason is None
    assert first.boots == [(Accelerator.KVM, KVM_BOOT_SECONDS), (Accelerator.KVM, KVM_RETRY_BOOT_SECONDS)]

    later = FakeQemuRuntime(tmp_path)
    later.make()
    assert later.accelerators == [Accelerator.KVM]


def test_repeated_kvm_timeout_falls_back_to_emulation(tmp_path):
    first, later = FakeQemuRuntime(tmp_path, TIMED_OUT, TIMED_OUT), FakeQemuRuntime(tmp_path)
    assert "emulated" in first.make().slow_reason
    assert "emulated" in later.make().slow_reason
    assert first.accelerators == [Accelerator.KVM, Accelerator.KVM, Accelerator.TCG]
    assert later.accelerators == [Accelerator.TCG]


def test_kvm_timeouts_on_a_busy_machine_do_not_disable_kvm(tmp_path, monkeypatch):
    set_load(monkeypatch, 3)
    first, second, later = (
        FakeQemuRuntime(tmp_path, *outcomes) for outcomes in ([TIMED_OUT] * 2, [TIMED_OUT] * 3, [BOOTED])
    )
    assert first.make().slow_reason is None
    assert first.boots[-1] == (Accelerator.KVM, KVM_BUSY_BOOT_SECONDS)
    assert "emulated" in second.make().slow_reason
    assert second.accelerators == [*[Accelerator.KVM] * 3, Accelerator.TCG]
    assert later.make().slow_reason is None
    assert later.accelerators == [Accelerator.KVM]


def test_boot_errors_other_than_timeouts_do_not_disable_kvm(tmp_path):
    first, later = FakeQemuRuntime(tmp_path, BROKEN, BROKEN), FakeQemuRuntime(tmp_path)
    assert "emulated" in first.make().slow_reason
    assert later.make().slow_reason is None
    assert later.accelerators == [Accelerator.KVM]


def test_machine_without_kvm_uses_emulation_and_has_no_slow_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    qemu_runtime = FakeQemuRuntime(tmp_path)
    assert qemu_runtime.make().slow_reason is None
    assert qemu_runtime.accelerators == [Accelerator.TCG]


def test_kvm_does_not_fall_back_if_emulation_is_excluded(tmp_path):
    qemu_runtime = FakeQemuRuntime(tmp_path, TIMED_OUT, TIMED_OUT, excludes_emulation=True)
    with pytest.raises(AttemptError, match="did not boot: not in time") as raised:
        qemu_runtime.make()
    assert raised.value.code == "provision_failed"

    later = FakeQemuRuntime(tmp_path, excludes_emulation=True)
    later.make()
    assert later.accelerators == [Accelerator.KVM]


@pytest.mark.parametrize(
    ("outcomes", "is_explicit_only"),
    [([], False), ([TIMED_OUT], False), ([TIMED_OUT, TIMED_OUT], True), ([BROKEN, BROKEN], True)],
)
def test_probe_reports_that_emulation_must_be_selected_explicitly(tmp_path, monkeypatch, outcomes, is_explicit_only):
    async def create_once(qemu_runtime, *_, **__):
        await qemu_runtime.create(
            qemu_runtime._build_handle("abcdefghijkl", None), SandboxSpec("abcdefghijkl", Path("/d"), 1, 1, 1)
        )
        return frozenset({"memory", "cpus", "processes"})

    monkeypatch.setattr(runtime, "run_probe", create_once)
    monkeypatch.setattr("os.getuid", lambda: 0)
    probe = asyncio.run(FakeQemuRuntime(tmp_path, *outcomes).probe())
    assert (probe.is_available, probe.is_explicit_only) == (True, is_explicit_only)
    assert any("no KVM" in gap for gap in probe.gaps) is is_explicit_only

    automatic = asyncio.run(FakeQemuRuntime(tmp_path, *outcomes, excludes_emulation=True).probe())
    assert automatic.is_available is not is_explicit_only
    assert ("explicitly" in automatic.remedy) is is_explicit_only


def test_guest_is_not_booted_with_slow_kvm(tmp_path, monkeypatch):
    set_kvm_speed(monkeypatch, fails_speed_selftest=True)
    monkeypatch.setattr("os.getuid", lambda: 0)
    qemu_runtime = FakeQemuRuntime(tmp_path, excludes_emulation=True)
    automatic = asyncio.run(qemu_runtime.probe())
    assert (automatic.is_available, qemu_runtime.boots) == (False, [])
    assert "explicitly" in automatic.remedy

    later = FakeQemuRuntime(tmp_path)
    assert "emulated" in later.make().slow_reason
    assert later.accelerators == [Accelerator.TCG]


def test_kvm_device_that_cannot_be_opened_is_a_boot_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "device", property(lambda _: str(tmp_path / "nothing")))
    sandbox = QemuSandbox.__new__(QemuSandbox)
    sandbox._guest_spec = type("Plan", (), {"accelerator": Accelerator.KVM})
    with pytest.raises(BootError, match="cannot be opened: No such file"):
        sandbox._open_accelerator()
