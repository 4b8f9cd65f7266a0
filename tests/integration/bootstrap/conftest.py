"""Fixtures for the doctor tests."""

import pytest

from sandbox.bootstrap.doctor import host_checks


@pytest.fixture
def without_runtime_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the runtime probes: detecting a broken KVM takes ten seconds."""
    monkeypatch.setattr(host_checks, "check_runtimes", lambda *_: [])
