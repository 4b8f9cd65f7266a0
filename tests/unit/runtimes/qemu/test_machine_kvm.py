"""Where KVM works a guest has it, also on a busy machine; where it does not, who waits is told why."""

import asyncio
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import SandboxSpec
from sandbox.model.errors import AttemptError
from sandbox.runtimes.qemu import parts, runtime
from sandbox.runtimes.qemu.kvm import KvmStatus
from sandbox.runtimes.qemu.machine import Accelerator
from sandbox.runtimes.qemu.runtime import KVM_BOOT_SECONDS, KVM_RETRY_BOOT_SECONDS, QemuRuntime
from sandbox.runtimes.qemu.sandbox import BootError, QemuSandbox

LATE = BootError("not in time", has_timed_out=True)
BROKEN = BootError("no memory for it")
ANSWERS = None


class Guests(QemuRuntime):
    """What comes of each boot is known before; by default a guest answers."""

    def __init__(self, place, *outcomes, only_kvm=False):
        super().__init__(place / "run", only_kvm=only_kvm)
        self.tried = []
        self.outcomes = list(outcomes)

    async def _boot(self, handle, spec, within_seconds):
        self.tried.append((self._plans[handle.attempt_id].accelerator, within_seconds))
        outcome = self.outcomes.pop(0) if self.outcomes else ANSWERS
        if outcome is not ANSWERS:
            raise outcome
        made = QemuSandbox.__new__(QemuSandbox)
        made.slow_reason = None
        return made

    def make(self):
        spec = SandboxSpec("abcdefghijkl", Path("/disk"), 1, 1 << 28, 64)
        return asyncio.run(self.create(self._build_handle("abcdefghijkl", None), spec))

    @property
    def accelerators(self):
        return [accelerator for accelerator, _ in self.tried]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """One with everything that a guest needs, and with KVM's device."""
    found = parts.GuestComponents("/v", Path("/k"), [], Path("/py"), Path("/py/bin/python3"))
    monkeypatch.setattr(runtime, "find_components", lambda: found)
    monkeypatch.setattr(runtime, "find_components", lambda: found)
    monkeypatch.setattr("os.access", lambda path, mode: path == "/dev/kvm")
    counting(monkeypatch, is_too_slow=False)


def counting(monkeypatch, *, is_too_slow):
    async def counted(_):
        return is_too_slow

    monkeypatch.setattr(KvmStatus, "is_too_slow", counted)


def test_a_boot_that_a_busy_machine_makes_slow_is_given_more_time_and_changes_nothing(tmp_path):
    busy = Guests(tmp_path, LATE)
    assert busy.make().slow_reason is None
    assert busy.tried == [(Accelerator.KVM, KVM_BOOT_SECONDS), (Accelerator.KVM, KVM_RETRY_BOOT_SECONDS)]

    later = Guests(tmp_path)
    later.make()
    assert later.accelerators == [Accelerator.KVM]


def test_where_kvm_does_not_come_to_an_end_guests_are_emulated_and_each_says_so(tmp_path):
    first, later = Guests(tmp_path, LATE, LATE), Guests(tmp_path)
    assert "emulated" in first.make().slow_reason
    assert "emulated" in later.make().slow_reason
    assert first.accelerators == [Accelerator.KVM, Accelerator.KVM, Accelerator.TCG]
    assert later.accelerators == [Accelerator.TCG]


def test_what_is_not_kvms_fault_is_not_kept_in_mind(tmp_path):
    first, later = Guests(tmp_path, BROKEN, BROKEN), Guests(tmp_path)
    assert "emulated" in first.make().slow_reason
    assert later.make().slow_reason is None
    assert later.accelerators == [Accelerator.KVM]


def test_a_machine_without_kvm_has_emulated_guests_and_nothing_to_tell(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    guests = Guests(tmp_path)
    assert guests.make().slow_reason is None
    assert guests.accelerators == [Accelerator.TCG]


def test_nobody_who_did_not_ask_for_it_gets_an_emulated_guest(tmp_path):
    guests = Guests(tmp_path, LATE, LATE, only_kvm=True)
    with pytest.raises(AttemptError, match="did not boot: not in time") as raised:
        guests.make()
    assert raised.value.code == "provision_failed"

    later = Guests(tmp_path, only_kvm=True)
    later.make()
    assert later.accelerators == [Accelerator.KVM]


@pytest.mark.parametrize(
    ("outcomes", "only_by_name"), [([], False), ([LATE], False), ([LATE, LATE], True), ([BROKEN, BROKEN], True)]
)
def test_a_probe_tells_by_what_its_guest_booted(tmp_path, monkeypatch, outcomes, only_by_name):
    async def try_once(guests, *_, **__):
        await guests.create(
            guests._build_handle("abcdefghijkl", None), SandboxSpec("abcdefghijkl", Path("/d"), 1, 1, 1)
        )
        return frozenset({"memory", "cpus", "processes"})

    monkeypatch.setattr(runtime, "run_probe", try_once)
    monkeypatch.setattr("os.getuid", lambda: 0)
    found = asyncio.run(Guests(tmp_path, *outcomes).probe())
    assert (found.is_available, found.is_explicit_only) == (True, only_by_name)
    assert any("no KVM" in gap for gap in found.gaps) is only_by_name

    unasked = asyncio.run(Guests(tmp_path, *outcomes, only_kvm=True).probe())
    assert unasked.is_available is not only_by_name
    assert ("explicitly" in unasked.remedy) is only_by_name


def test_where_kvm_is_too_slow_to_count_no_boot_is_waited_for(tmp_path, monkeypatch):
    counting(monkeypatch, is_too_slow=True)
    monkeypatch.setattr("os.getuid", lambda: 0)
    guests = Guests(tmp_path, only_kvm=True)
    unasked = asyncio.run(guests.probe())
    assert (unasked.is_available, guests.tried) == (False, [])
    assert "explicitly" in unasked.remedy

    later = Guests(tmp_path)
    assert "emulated" in later.make().slow_reason
    assert later.accelerators == [Accelerator.TCG]


def test_a_device_that_is_not_to_be_opened_is_a_boot_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "device", property(lambda _: str(tmp_path / "nothing")))
    made = QemuSandbox.__new__(QemuSandbox)
    made._plan = type("Plan", (), {"accelerator": Accelerator.KVM})
    with pytest.raises(BootError, match="cannot be opened: No such file"):
        made._open_accelerator()
