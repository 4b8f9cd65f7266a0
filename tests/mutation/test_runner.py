"""Runs tests in a copy of the checkout, each time in a fork of a process that has imported the libraries."""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import coverage
import pytest
from hypothesis import Phase, settings

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_OPTIONS = (
    *("-q", "--no-header", "--tb=line", "-n0", "-pno:randomly", "-pno:cacheprovider"),
    "--timeout=30",
    "-Wignore:Module already imported:pytest.PytestAssertRewriteWarning",
)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Outcome:
    """What came of a run. failed: the first test that failed, or why the run ended; empty when all passed."""

    failed: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


class Copy:
    """A copy of the checkout, for one process that runs tests in it one after the other."""

    def __init__(self, checkout: Path, directory: Path) -> None:
        self.root = directory / "checkout"
        self.temporary = directory / "tmp"
        self._said = directory / "said"
        self.temporary.mkdir(parents=True)
        self.root.mkdir()
        for path in checkout.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                without = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(path, self.root / path.name, ignore=without, symlinks=True)
            elif path.is_file() and not path.is_symlink():
                shutil.copy(path, self.root)
        if (checkout / ".venv").exists():
            (self.root / ".venv").symlink_to(checkout / ".venv")

    def enter(self) -> None:
        """Make this process one whose forks run the copy's tests. It adopts whatever they leave behind."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        adopt_orphans()
        os.chdir(self.root)
        places = [str(self.root / "src"), str(self.root / "tests"), str(self.root)]
        sys.path[:0] = places
        os.environ |= {"PYTHONPATH": os.pathsep.join(places), "TMPDIR": str(self.temporary)}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, job: Callable[[], Outcome], *, wall_seconds: float, cpu_seconds: float) -> Outcome:
        """Run in a fork. It and all that it started have ended, and its files are gone, on return."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._work(job, writing, cpu_seconds)
        os.close(writing)
        try:
            answer = _read_all(reading, time.monotonic() + wall_seconds)
        finally:
            os.close(reading)
            end_children()
            for path in (*self.temporary.iterdir(), self.root / ".hypothesis"):
                shutil.rmtree(path, ignore_errors=True)
        if answer is None:
            return Outcome("timeout")
        return pickle.loads(answer) if answer else Outcome(f"no answer: {self._said.read_text()[-2000:]}")

    def _work(self, job: Callable[[], Outcome], writing: int, cpu_seconds: float) -> None:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, number in ((nothing, 0), (said, 1), (said, 2)):
                os.dup2(descriptor, number)
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            answer = pickle.dumps(job())
            with os.fdopen(writing, "wb") as opened:
                opened.write(answer)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)


def _read_all(reading: int, deadline: float) -> bytes | None:
    """All until the end; None when that does not come in time."""
    data = b""
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            return data
        data += piece
    return None


def adopt_orphans() -> None:
    """Let `end_children` find what children of this process leave behind."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill and reap every descendant. What a killed one leaves behind is adopted, and killed in the next turn."""
    own = os.getpid()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = [pid for task in Path(f"/proc/{own}/task").iterdir() for pid in _children(task)]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _children(task: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from map(int, (task / "children").read_text().split())


def libraries(files: list[str], root: Path) -> Outcome:
    """Collect the tests of these files, and tell what that imports beside the copy."""
    code = pytest.main([*_OPTIONS, "--collect-only", *files])
    places = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    found = [name for name, file in places.items() if file and not Path(file).is_relative_to(root)]
    return Outcome("" if code == pytest.ExitCode.OK else f"tests cannot be collected: {code!r}", modules=found)


def preload(modules: list[str]) -> None:
    """Import libraries once, for all forks."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_tests(files: list[str], wanted: list[str] | None, seed: int, measured: list[Path]) -> Outcome:
    """Run the wanted tests of these files in this order, all when there are none; stops at the first failure.

    measured: files whose lines are told test by test.
    """
    watcher = _Watcher(wanted, measured)
    code = pytest.main([*_OPTIONS, f"--hypothesis-seed={seed}", "-x", *files], plugins=[watcher])
    outcome = watcher.outcome
    if not outcome.failed and code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        outcome.failed = watcher.broken or f"pytest ended with {code!r}"
    return outcome


class _Watcher:
    def __init__(self, wanted: list[str] | None, measured: list[Path]) -> None:
        self.outcome = Outcome()
        self.broken = ""
        self._wanted = wanted
        self._measured = measured
        self._coverage = coverage.Coverage(data_file=None, include=[str(path) for path in measured], config_file=False)

    def pytest_sessionstart(self) -> None:
        """Failing examples need not be small, and are not kept."""
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", settings(), database=None, phases=phases)
        settings.load_profile("mutation")
        if self._measured:
            self._coverage.start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Only the wanted ones."""
        known = {item.nodeid: item for item in items}
        if self._wanted is not None:
            items[:] = [known[name] for name in self._wanted if name in known]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note time and lines of each test."""
        if self._measured:
            self._coverage.switch_context(item.nodeid)
        began = time.monotonic()
        try:
            return (yield)
        finally:
            self.outcome.seconds[item.nodeid] = time.monotonic() - began
            if self._measured:
                self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first failure."""
        if report.failed and not self.outcome.failed:
            self.outcome.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what could not be imported."""
        if report.failed and not self.broken:
            self.broken = f"import of {report.nodeid}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Tell the lines of each measured file with the tests that ran them."""
        if not self._measured:
            return
        self._coverage.stop()
        data = self._coverage.get_data()
        self.outcome.lines = {str(path): data.contexts_by_lineno(str(path)) for path in self._measured}
