"""What the suites over every runtime share."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.contracts.runtime import Probe, Runtime
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.gvisor import GvisorRuntime

RUNTIMES: dict[str, Callable[[Path], Runtime]] = {"bubblewrap": BubblewrapRuntime, "gvisor": GvisorRuntime}
_found: dict[str, Probe] = {}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Runtime:
    """Each runtime in turn; skipped where it does not work."""
    runtime = RUNTIMES[request.param](tmp_path / "run")
    if request.param not in _found:
        _found[request.param] = asyncio.run(runtime.probe())
    if not _found[request.param].works:
        pytest.skip(f"{request.param} does not work here: {_found[request.param].mend}")
    return runtime


@pytest.fixture
def limits(runtime: Runtime) -> frozenset[str]:
    """The limits that hold here."""
    return _found[runtime.name].limits


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A private directory: nobody but its owner can walk to it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    disk = private / "disk"
    disk.mkdir()
    return disk
