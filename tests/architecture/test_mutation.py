"""`script/mutate` creates mutants of every kind, reports survivors, and leaves no files or processes."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from mutation.main import equivalents_of
from mutation.mutants import mutants_of

SAMPLE = '''"""A module."""

from typing import Any

LIMIT = 10
NAMES = {"a": 1, "b": 2}
KINDS = ("x", "y")
Kind = dict[str, int] | None


class Thing:
    """A class."""

    size: int = 3

    @property
    def label(self) -> str:
        """What it is called."""
        return f"{self.size} things"

    def flush(self, force: bool = False) -> bool:
        self.file.flush()
        for name in KINDS:
            if name in NAMES and not force:
                break
        try:
            return self.size - 1 < LIMIT
        except OSError as error:
            raise ValueError("This is a sentence.") from error
'''


@pytest.fixture
def sample(tmp_path: Path) -> dict[tuple[str, str], str]:
    """The operators of the sample's mutants, keyed by original and mutated line."""
    (tmp_path / "sample.py").write_text(SAMPLE)
    return {
        (mutant.original, mutant.mutated): mutant.operator for mutant in mutants_of(tmp_path / "sample.py", tmp_path)
    }


@pytest.mark.parametrize(
    ("operator", "original", "mutated"),
    [
        ("constant", "LIMIT = 10", "LIMIT = 11"),
        ("constant", "LIMIT = 10", "LIMIT = (9)"),
        ("statement", "LIMIT = 10", "pass"),
        ("element", 'NAMES = {"a": 1, "b": 2}', 'NAMES = {"b": 2}'),
        ("element", 'NAMES = {"a": 1, "b": 2}', 'NAMES = {"a": 1}'),
        ("element", 'KINDS = ("x", "y")', "KINDS = ('y',)"),
        ("element", 'KINDS = ("x", "y")', 'KINDS = ("x",)'),
        ("constant", 'KINDS = ("x", "y")', "KINDS = ('XXx', \"y\")"),
        ("constant", "def flush(self, force: bool = False) -> bool:", "def flush(self, force: bool = True) -> bool:"),
        ("statement", "self.file.flush()", "pass"),
        ("boolean", "if name in NAMES and not force:", "if (name in NAMES or not force):"),
        ("comparison", "if name in NAMES and not force:", "if (name not in NAMES) and not force:"),
        ("negation", "if name in NAMES and not force:", "if name in NAMES and (force):"),
        ("condition", "if name in NAMES and not force:", "if (not (name in NAMES and (not force))):"),
        ("loop", "break", "continue"),
        ("return", "return self.size - 1 < LIMIT", "return None"),
        ("comparison", "return self.size - 1 < LIMIT", "return (self.size - 1 <= LIMIT)"),
        ("arithmetic", "return self.size - 1 < LIMIT", "return (self.size + 1) < LIMIT"),
        ("exception", "except OSError as error:", "except FloatingPointError as error:"),
        (
            "exception",
            'raise ValueError("This is a sentence.") from error',
            'raise FloatingPointError("This is a sentence.") from error',
        ),
    ],
)
def test_each_operator_creates_its_mutants(sample, operator, original, mutated):
    assert sample[original, mutated] == operator


def test_types_and_prose_and_docstrings_are_not_mutated(sample):
    assert not [original for original, _ in sample if "things" in original and "return None" not in _]
    assert not [mutated for _, mutated in sample if "XXThis" in mutated or "XXA " in mutated]
    assert not [original for original, _ in sample if original.startswith(("Kind =", "from ", "@"))]


def test_mutants_have_unique_sources_and_keys(tmp_path):
    (tmp_path / "sample.py").write_text(SAMPLE + "\n\nFIRST = 1\nFIRST = 1\n")
    mutants = mutants_of(tmp_path / "sample.py", tmp_path)
    assert len({mutant.key for mutant in mutants}) == len({mutant.source for mutant in mutants}) == len(mutants)
    assert [mutant.occurrence for mutant in mutants if mutant.mutated == "FIRST = 2"] == [1, 2]
    assert [mutant.scope for mutant in mutants if mutant.mutated == "LIMIT = 11"] == [""]
    assert {mutant.scope for mutant in mutants if "NAMES and" in mutant.original} == {"Thing.flush"}


def test_listed_equivalent_mutants_exist_and_have_reasons(root: Path):
    sources = root / "src" / "sandbox"
    targets = tomllib.loads((root / "tests" / "mutation" / "targets.toml").read_text())["targets"]
    mutants = {file: mutants_of(sources / file, sources) for file in targets}
    reasons, stale = equivalents_of(root, mutants)
    assert stale == []
    assert [key for key, reason in reasons.items() if len(reason) < 20] == []
    assert {path for paths in targets.values() for path in paths if not (root / "tests" / path).exists()} == set()


# The script in a project with one module


MODULE = """
def clamp(number, highest):
    if number > highest:
        number = highest
    return number


def count_down(number):
    steps = 0
    while number:
        number -= 1
        steps += 1
    return steps
"""
EQUIVALENT = """
[[equivalent]]
file = "tiny.py"
scope = "clamp"
original = "if number > highest:"
mutated = "if (number >= highest):"
reason = "The highest number is replaced by itself."
"""
TESTS = """
import os, subprocess
from sandbox.tiny import clamp, count_down

def test_clamp():
    assert [clamp(number, 3) for number in (2, 3, 4)] == [2, 3, 3]

def test_count_down():
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(os.environ["CHILD_PIDS"], "a") as file:
        print(child.pid, file=file)
    assert [count_down(number) for number in (0, 1, 3)] == [0, 1, 3]
"""


class Project:
    """A checkout with one module, in which the script can run."""

    def __init__(self, directory: Path, root: Path) -> None:
        self.checkout, self.temporary, self.child_pids = (directory / name for name in ("checkout", "tmp", "pids"))
        self._root = root
        files = {
            "src/sandbox/__init__.py": "",
            "src/sandbox/tiny.py": MODULE,
            "tests/test_tiny.py": TESTS,
            "tests/mutation/targets.toml": '[targets]\n"tiny.py" = ["test_tiny.py"]\n',
            "tests/mutation/equivalents.toml": EQUIVALENT,
        }
        for name, text in files.items():
            self.write(name, text)
        self.temporary.mkdir()
        self.child_pids.touch()

    def write(self, name: str, text: str) -> None:
        path = self.checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen:
        code = (
            "import sys; from pathlib import Path; from mutation import main; main.CPU_SECONDS = 1;"
            "sys.exit(main.main(sys.argv[2:], Path(sys.argv[1])))"
        )
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))},
            **{
                "PYTHONPATH": str(self._root / "tests"),
                "TMPDIR": str(self.temporary),
                "CHILD_PIDS": str(self.child_pids),
            },
        }
        command = [sys.executable, "-c", code, str(self.checkout), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str) -> tuple[int, str]:
        with self.start(*arguments) as running:
            output, _ = running.communicate(timeout=300)
        return running.returncode, output

    def contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.checkout.rglob("*") if path.is_file()}

    def assert_clean(self) -> None:
        assert list(self.temporary.iterdir()) == []
        children = [int(pid) for pid in self.child_pids.read_text().split()]
        assert children, "the tests started no child processes"
        assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Project:
    return Project(tmp_path, root)


def test_all_mutants_of_a_tested_module_are_killed(project):
    before = project.contents()
    code, output = project.run("--sample", "0", "--seed", "7")
    lines = output.splitlines()
    assert lines[0].startswith("seed 7: ")
    assert "1 equivalent mutants skipped; seed 7" in lines[-1]
    assert (code, "100.0 %" in lines[-1]) == (0, True), output
    assert project.contents() == before
    project.assert_clean()


def test_surviving_mutant_is_shown_and_a_low_score_fails_the_run(project):
    project.write("tests/mutation/equivalents.toml", "")
    code, output = project.run("tiny.py:3", "--sample", "0", "--seed", "7", "--minimum", "99")
    assert code == 1
    assert "tiny.py:3 in clamp (comparison, occurrence 1)" in output
    assert "  - if number > highest:\n  + if (number >= highest):\n" in output
    assert project.run("tiny.py:3", "--sample", "0", "--minimum", "1")[0] == 0


def test_outdated_equivalent_mutant_is_reported(project):
    project.write("src/sandbox/tiny.py", MODULE.replace("number > highest", "highest < number"))
    code, output = project.run("tiny.py:4", "--minimum", "0")
    assert code == 1
    assert "stale: tiny.py no longer has the mutant: if number > highest:" in output


def test_failing_baseline_stops_the_run(project):
    project.write("tests/test_tiny.py", TESTS + "\ndef test_no():\n    assert False\n")
    with project.start("--sample", "1") as running:
        running.communicate(timeout=100)
    assert running.returncode == 1
    assert list(project.temporary.iterdir()) == []


def test_terminated_run_leaves_no_files_or_processes(project):
    project.write("tests/test_tiny.py", TESTS + "\ndef test_long():\n    import time\n    time.sleep(60)\n")
    with project.start("--sample", "0") as running:
        deadline = time.monotonic() + 60
        while not project.child_pids.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    assert running.returncode != 0
    project.assert_clean()
