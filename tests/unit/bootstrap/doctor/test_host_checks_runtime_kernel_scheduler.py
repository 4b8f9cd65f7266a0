"""`sandbox doctor` reports a kernel whose scheduler lets a sandbox keep host programs from running."""

import pytest

from sandbox.bootstrap.doctor import host_checks
from sandbox.interfaces.runtime import RuntimeProbe

BUBBLEWRAP = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)
GVISOR = RuntimeProbe("gvisor", is_available=True, tier="gvisor", strength=20)
BROKEN = RuntimeProbe("bubblewrap", is_available=False, tier="namespaces", strength=10, remedy="no")


def set_release(monkeypatch, release):
    monkeypatch.setattr(host_checks.os, "uname", lambda: type("Names", (), {"release": release}))


@pytest.mark.parametrize("release", ["6.13.0", "6.13", "6.18.44-fc-v669", "6.17.9+deb14-amd64", "6.19.3"])
def test_kernel_with_the_error_is_reported_with_the_remedy(monkeypatch, release):
    set_release(monkeypatch, release)
    (finding,) = host_checks.check_kernel_scheduler_bug(BUBBLEWRAP)
    assert (finding.ok, finding.blocks_tasks) == (False, False)
    assert "one task on bubblewrap" in finding.message
    assert "6.18.45" in finding.remedy


@pytest.mark.parametrize(
    "release", ["6.12.118+deb13-cloud-amd64", "6.18.45", "6.18.100-1", "7.0.0", "5.10.0-35-amd64", "unknown"]
)
def test_kernel_without_the_error_is_not_reported(monkeypatch, release):
    set_release(monkeypatch, release)
    assert not host_checks.check_kernel_scheduler_bug(BUBBLEWRAP)


def test_runtimes_with_a_separate_kernel_and_unavailable_runtimes_are_not_reported(monkeypatch):
    set_release(monkeypatch, "6.18.44")
    assert not host_checks.check_kernel_scheduler_bug(GVISOR)
    assert not host_checks.check_kernel_scheduler_bug(BROKEN)
