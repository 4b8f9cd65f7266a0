"""Fixtures for the test suites that run on every runtime, and on every engine."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from doubles import slurm_cluster
from doubles.engine_harnesses import Job, KubernetesHarness, ProcessHarness, SlurmHarness
from doubles.runtime_availability import RUN_ALL_QEMU_TESTS, record_slow_kvm, require_qemu_components, require_runtime
from sandbox.interfaces.cluster_engine import Engine
from sandbox.interfaces.runtime import Runtime
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.gvisor import GvisorRuntime
from sandbox.runtimes.qemu import QemuRuntime

RUNTIMES: dict[str, Callable[[Path], Runtime]] = {
    "bubblewrap": BubblewrapRuntime,
    "gvisor": GvisorRuntime,
    "qemu": QemuRuntime,
}

_QEMU_SAMPLE = {"test_kill_ends_detached_processes"}
"""The tests that run on QEMU by default. A test in tests/integration/runtimes covers the rest in one guest."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect QEMU tests that are not in the sample."""
    if RUN_ALL_QEMU_TESTS:
        return
    deselected = [item for item in items if _is_deselected(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not _is_deselected(item)]


def _is_deselected(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not item.name.partition("[")[2].startswith("qemu"):
        return False
    return item.originalname not in _QEMU_SAMPLE and item.path.is_relative_to(Path(__file__).parent)


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Runtime:
    """Each runtime in turn. The test is skipped if the runtime does not work on this machine."""
    if request.param == "qemu":
        require_qemu_components()  # a probe would boot another guest
        record_slow_kvm(tmp_path / "run")
    else:
        require_runtime(request.param, tmp_path / "probe")
    return RUNTIMES[request.param](tmp_path / "run")


@pytest.fixture
def enforced_limits(runtime: Runtime, tmp_path: Path) -> frozenset[str]:
    """The limits that are enforced on this machine. A guest kernel enforces its own limits."""
    if runtime.name == "qemu":
        return frozenset({"memory", "processes"})
    return require_runtime(runtime.name, tmp_path / "probe").enforced_limits


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory whose parent directory only the owner can enter."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    disk = private / "disk"
    disk.mkdir()
    return disk


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm_cluster.SlurmCluster]:
    """A Slurm cluster of three hosts. The test is skipped if Slurm is not installed."""
    slurm_cluster.require_slurm()
    with slurm_cluster.SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def process_harness(tmp_path: Path) -> Iterator[ProcessHarness]:
    """The engine that starts local processes."""
    with closing(ProcessHarness(tmp_path)) as harness:
        yield harness


@pytest.fixture
def slurm_harness(cluster: slurm_cluster.SlurmCluster) -> Iterator[SlurmHarness]:
    """The engine that submits jobs to Slurm."""
    with closing(SlurmHarness(cluster)) as harness:
        yield harness


@pytest.fixture
def kubernetes_harness(tmp_path: Path) -> Iterator[KubernetesHarness]:
    """The engine that submits Jobs to a double of Kubernetes."""
    with closing(KubernetesHarness(tmp_path)) as harness:
        yield harness


Harness = ProcessHarness | KubernetesHarness | SlurmHarness


@pytest.fixture(
    params=["process_harness", "kubernetes_harness", "slurm_harness"], ids=["processes", "kubernetes", "slurm"]
)
def harness(request: pytest.FixtureRequest) -> Harness:
    """Each engine in turn. A test module for one engine overrides this fixture."""
    harness: Harness = request.getfixturevalue(request.param)
    return harness


@pytest.fixture
def engine(harness: Harness) -> Engine:
    """The engine of the harness."""
    return harness.create_engine()


@pytest.fixture
def create_job(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that creates a job whose worker performs an action."""
    numbers = itertools.count()
    return lambda *action, **fields: Job(tmp_path / f"job-{next(numbers)}", *action, **fields)
