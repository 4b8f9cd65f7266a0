"""Runs tests in a copy of the checkout. Each run is a fork of a process that has imported the libraries."""

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
    """The outcome of a run. failed: the first failed test, or why the run ended early; empty if all tests passed."""

    failed: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


class CheckoutCopy:
    """A copy of the checkout, in which one process runs tests sequentially."""

    def __init__(self, checkout: Path, directory: Path) -> None:
        self.root = directory / "checkout"
        self.temporary = directory / "tmp"
        self._output = directory / "output"
        self.temporary.mkdir(parents=True)
        self.root.mkdir()
        for path in checkout.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(path, self.root / path.name, ignore=ignored, symlinks=True)
            elif path.is_file() and not path.is_symlink():
                shutil.copy(path, self.root)
        if (checkout / ".venv").exists():
            (self.root / ".venv").symlink_to(checkout / ".venv")

    def enter(self) -> None:
        """Prepare this process to run the copy's tests in forks, and to adopt their orphans."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        adopt_orphans()
        os.chdir(self.root)
        paths = [str(self.root / "src"), str(self.root / "tests"), str(self.root)]
        sys.path[:0] = paths
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(self.temporary)}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, job: Callable[[], Outcome], *, wall_seconds: float, cpu_seconds: float) -> Outcome:
        """Run the job in a fork. On return, the fork and its descendants have ended and their files are gone."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._work(job, writer, cpu_seconds)
        os.close(writer)
        try:
            result = _read_all(reader, time.monotonic() + wall_seconds)
        finally:
            os.close(reader)
            end_children()
            for path in (*self.temporary.iterdir(), self.root / ".hypothesis"):
                shutil.rmtree(path, ignore_errors=True)
        if result is None:
            return Outcome("timeout")
        return pickle.loads(result) if result else Outcome(f"no result: {self._output.read_text()[-2000:]}")

    def _work(self, job: Callable[[], Outcome], writer: int, cpu_seconds: float) -> None:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            output = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            null = os.open(os.devnull, os.O_RDONLY)
            for descriptor, number in ((null, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, number)
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            result = pickle.dumps(job())
            with os.fdopen(writer, "wb") as stream:
                stream.write(result)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes | None:
    """Read until the end of the file; return None if the deadline passes first."""
    data = b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return data
        data += chunk
    return None


def adopt_orphans() -> None:
    """Adopt orphans of child processes, so that `end_children` finds them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill and reap all descendants. Orphans of a killed process are adopted, and killed in the next iteration."""
    own_pid = os.getpid()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = [pid for task in Path(f"/proc/{own_pid}/task").iterdir() for pid in _children(task)]
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


def collect_libraries(files: list[str], root: Path) -> Outcome:
    """Collect the tests in these files, and return the imported modules that are outside the copy."""
    code = pytest.main([*_OPTIONS, "--collect-only", *files])
    module_files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    outside = [name for name, file in module_files.items() if file and not Path(file).is_relative_to(root)]
    return Outcome("" if code == pytest.ExitCode.OK else f"tests cannot be collected: {code!r}", modules=outside)


def preload(modules: list[str]) -> None:
    """Import libraries once, for all forks."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_tests(files: list[str], wanted: list[str] | None, seed: int, covered_files: list[Path]) -> Outcome:
    """Run tests from these files until the first failure.

    wanted: the tests to run, in order; None runs all tests.
    covered_files: files whose covered lines are recorded per test.
    """
    plugin = _ResultPlugin(wanted, covered_files)
    code = pytest.main([*_OPTIONS, f"--hypothesis-seed={seed}", "-x", *files], plugins=[plugin])
    outcome = plugin.outcome
    if not outcome.failed and code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        outcome.failed = plugin.collection_error or f"pytest ended with {code!r}"
    return outcome


class _ResultPlugin:
    def __init__(self, wanted: list[str] | None, covered_files: list[Path]) -> None:
        self.outcome = Outcome()
        self.collection_error = ""
        self._selected_tests = wanted
        self._covered_files = covered_files
        self._coverage = coverage.Coverage(
            data_file=None, include=[str(path) for path in covered_files], config_file=False
        )

    def pytest_sessionstart(self) -> None:
        """Configure Hypothesis to neither shrink nor store failing examples."""
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", settings(), database=None, phases=phases)
        settings.load_profile("mutation")
        if self._covered_files:
            self._coverage.start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Select the wanted tests."""
        known = {item.nodeid: item for item in items}
        if self._selected_tests is not None:
            items[:] = [known[name] for name in self._selected_tests if name in known]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Record each test's duration and covered lines."""
        if self._covered_files:
            self._coverage.switch_context(item.nodeid)
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.outcome.seconds[item.nodeid] = time.monotonic() - started
            if self._covered_files:
                self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the first failure."""
        if report.failed and not self.outcome.failed:
            self.outcome.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record import errors."""
        if report.failed and not self.collection_error:
            self.collection_error = f"import of {report.nodeid}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Record which tests ran each line of each covered file."""
        if not self._covered_files:
            return
        self._coverage.stop()
        data = self._coverage.get_data()
        self.outcome.lines = {str(path): data.contexts_by_lineno(str(path)) for path in self._covered_files}
