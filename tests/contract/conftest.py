"""What the suites over every runtime share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from doubles.runtimes import QEMU_WHOLE, need_parts_of_guests, need_runtime, tell_of_kvm
from sandbox.interfaces.runtime import Runtime
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.gvisor import GvisorRuntime
from sandbox.runtimes.qemu import QemuRuntime

RUNTIMES: dict[str, Callable[[Path], Runtime]] = {
    "bubblewrap": BubblewrapRuntime,
    "gvisor": GvisorRuntime,
    "qemu": QemuRuntime,
}

_SAMPLE_IN_A_GUEST = {"test_kill_ends_what_hides_from_it"}
"""What qemu is asked here where it is not asked everything; a story of tests/integration/runtimes asks one guest what
else a guest does in a way of its own."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is no part of the sample."""
    if QEMU_WHOLE:
        return
    left_out = [item for item in items if _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not item.name.partition("[")[2].startswith("qemu"):
        return False
    return item.originalname not in _SAMPLE_IN_A_GUEST and item.path.is_relative_to(Path(__file__).parent)


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Runtime:
    """Each runtime in turn; skipped where it does not work."""
    if request.param == "qemu":
        need_parts_of_guests()  # to probe is to boot one more
        tell_of_kvm(tmp_path / "run")
    else:
        need_runtime(request.param, tmp_path / "probe")
    return RUNTIMES[request.param](tmp_path / "run")


@pytest.fixture
def limits(runtime: Runtime, tmp_path: Path) -> frozenset[str]:
    """The limits that hold here; a guest has a kernel of its own that keeps those of what is inside."""
    if runtime.name == "qemu":
        return frozenset({"memory", "processes"})
    return need_runtime(runtime.name, tmp_path / "probe").limits


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A private directory: nobody but its owner can walk to it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    disk = private / "disk"
    disk.mkdir()
    return disk
