"""What a sandbox inherits does not depend on what the server was allowed."""

import resource

import pytest

from sandbox.runtimes.programs import process_limits


@pytest.mark.parametrize("allowed", [0, 40, resource.RLIM_INFINITY])
def test_no_sandbox_has_the_priorities_that_its_server_may_have(monkeypatch: pytest.MonkeyPatch, allowed: int):
    """Where the server's user plays sound, that user may ask for real time."""
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, allowed))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    process_limits.lower_limits()
    assert limits[resource.RLIMIT_RTPRIO] == limits[resource.RLIMIT_NICE] == (0, 0)


@pytest.mark.parametrize(("allowed", "bound"), [(100, 100), (resource.RLIM_INFINITY, process_limits.SIGNALS_MAX)])
def test_what_is_bounded_already_stays_so(monkeypatch: pytest.MonkeyPatch, allowed: int, bound: int):
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, allowed))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    process_limits.lower_limits()
    assert limits[resource.RLIMIT_SIGPENDING] == (bound, bound)
