"""A sandbox's process limits do not depend on the server's process limits."""

import resource

import pytest

from sandbox.runtimes.programs import inherited_limits


@pytest.mark.parametrize("hard_limit", [0, 40, resource.RLIM_INFINITY])
def test_priority_limits_are_zero(monkeypatch: pytest.MonkeyPatch, hard_limit: int):
    """Desktop systems may grant real-time priority to the server's user."""
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, hard_limit))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    inherited_limits.lower_limits()
    assert limits[resource.RLIMIT_RTPRIO] == limits[resource.RLIMIT_NICE] == (0, 0)


@pytest.mark.parametrize(("hard_limit", "expected"), [(100, 100), (resource.RLIM_INFINITY, 1024)])
def test_lower_existing_limit_is_not_raised(monkeypatch: pytest.MonkeyPatch, hard_limit: int, expected: int):
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, hard_limit))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    inherited_limits.lower_limits()
    assert limits[resource.RLIMIT_SIGPENDING] == (expected, expected)


@pytest.mark.parametrize(
    ("host_limits", "expected"),
    [
        ((1024, 4096), (1024, 4096)),
        ((1024, resource.RLIM_INFINITY), (1024, inherited_limits.HOST_PROGRAM_FILES_MAX)),
        ((10**9, 10**9), (inherited_limits.HOST_PROGRAM_FILES_MAX, inherited_limits.HOST_PROGRAM_FILES_MAX)),
        (
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
            (inherited_limits.HOST_PROGRAM_FILES_MAX, inherited_limits.HOST_PROGRAM_FILES_MAX),
        ),
    ],
)
def test_open_files_of_host_programs_are_limited(
    monkeypatch: pytest.MonkeyPatch, host_limits: tuple[int, int], expected: tuple[int, int]
):
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: host_limits)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    inherited_limits.limit_host_program_files()
    assert limits == {resource.RLIMIT_NOFILE: expected}
