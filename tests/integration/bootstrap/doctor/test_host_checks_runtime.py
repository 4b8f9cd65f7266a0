"""`sandbox doctor` reports the runtime that a server would use."""

from types import SimpleNamespace

import pytest

from sandbox.bootstrap.doctor import host_checks
from sandbox.bootstrap.runtime_selection import AUTO, RuntimeChoice
from sandbox.interfaces.runtime import RuntimeProbe

BUBBLEWRAP = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)
NEEDS_KVM = RuntimeProbe("qemu", is_available=False, tier="vm", strength=30, remedy="Request it by name.")
EMULATED = RuntimeProbe("qemu", is_available=True, tier="vm", strength=30, is_explicit_only=True)


@pytest.fixture(autouse=True)
def machine_without_kvm(monkeypatch):
    async def choose(requested, _):
        choices = {
            AUTO: RuntimeChoice(BUBBLEWRAP, [NEEDS_KVM, BUBBLEWRAP]),
            "qemu": RuntimeChoice(EMULATED, [EMULATED]),
            "bubblewrap": RuntimeChoice(BUBBLEWRAP, [BUBBLEWRAP]),
        }
        return choices[requested]

    async def no_problem(*_):
        return None

    monkeypatch.setattr(host_checks, "choose_runtime", choose)
    monkeypatch.setattr(host_checks, "find_confinement_problem", no_problem)
    monkeypatch.setattr(host_checks, "make_runtime", lambda *_, **__: SimpleNamespace())


def test_slow_runtime_is_not_reported_as_broken(tmp_path, monkeypatch):
    slow = RuntimeProbe("qemu", is_available=False, tier="vm", strength=30, remedy="…", is_explicit_only=True)

    async def choose(*_):
        return RuntimeChoice(BUBBLEWRAP, [slow, BUBBLEWRAP])

    monkeypatch.setattr(host_checks, "choose_runtime", choose)
    findings = host_checks.check_runtimes(AUTO, tmp_path)
    [finding] = [one for one in findings if one.name == "runtime"]
    assert (finding.message, finding.remedy) == (
        "qemu works only slowly without KVM, and is used only if selected by name",
        "",
    )


def report(requested, tmp_path):
    findings = host_checks.check_runtimes(requested, tmp_path)
    return {(one.ok, one.message) for one in findings if one.name in ("sandbox", "runtime")}


def test_explicitly_requested_emulation_is_used(tmp_path):
    assert report("qemu", tmp_path) == {(True, "sandboxes run with qemu"), (True, "bubblewrap works too")}


@pytest.mark.parametrize("requested", [AUTO, "bubblewrap"])
def test_emulation_is_not_used_by_default(tmp_path, requested):
    assert report(requested, tmp_path) == {
        (True, "sandboxes run with bubblewrap"),
        (False, "qemu does not work here"),
    }


@pytest.mark.parametrize(
    ("limits", "findings"),
    [
        (
            {"memory", "cpus", "processes", "sockets"},
            {(True, "on memory, CPUs, processes, socket buffers are enforced")},
        ),
        (
            {"memory", "cpus", "processes"},
            {
                (True, "on memory, CPUs, processes are enforced"),
                (
                    False,
                    "vm.memory does not count socket buffers: the kernel was booted with cgroup.memory=nosocket",
                ),
            },
        ),
        (
            {"memory", "processes"},
            {
                (True, "on memory, processes are enforced"),
                (False, "on CPUs are not enforced: no cgroup is writable"),
                (
                    False,
                    "vm.memory does not count socket buffers: the kernel was booted with cgroup.memory=nosocket",
                ),
            },
        ),
        (set(), {(False, "on memory, CPUs, processes, socket buffers are not enforced: no cgroup is writable")}),
    ],
)
def test_enforced_and_unenforced_limits_are_listed(tmp_path, monkeypatch, limits, findings):
    probe = RuntimeProbe(
        "bubblewrap", is_available=True, tier="namespaces", strength=10, enforced_limits=frozenset(limits)
    )

    async def choose(*_):
        return RuntimeChoice(probe, [probe])

    monkeypatch.setattr(host_checks, "choose_runtime", choose)
    found = host_checks.check_runtimes(AUTO, tmp_path)
    messages = {(one.ok, one.message) for one in found if one.name == "limits" and "fs.file-max" not in one.message}
    assert messages == findings
