"""`script/mutate` makes mutants of every kind, tells which survive, and leaves nothing behind."""

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
    """Operator by the lines before and after."""
    (tmp_path / "sample.py").write_text(SAMPLE)
    return {(one.original, one.mutated): one.operator for one in mutants_of(tmp_path / "sample.py", tmp_path)}


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
def test_a_mutant_of_each_kind_is_made(sample, operator, original, mutated):
    assert sample[original, mutated] == operator


def test_types_prose_and_docstrings_are_left_alone(sample):
    assert not [original for original, _ in sample if "things" in original and "return None" not in _]
    assert not [mutated for _, mutated in sample if "XXThis" in mutated or "XXA " in mutated]
    assert not [original for original, _ in sample if original.startswith(("Kind =", "from ", "@"))]


def test_each_mutant_is_another_source_and_has_its_own_key(tmp_path):
    (tmp_path / "sample.py").write_text(SAMPLE + "\n\nFIRST = 1\nFIRST = 1\n")
    found = mutants_of(tmp_path / "sample.py", tmp_path)
    assert len({one.key for one in found}) == len({one.source for one in found}) == len(found)
    assert [one.occurrence for one in found if one.mutated == "FIRST = 2"] == [1, 2]
    assert [one.scope for one in found if one.mutated == "LIMIT = 11"] == [""]
    assert {one.scope for one in found if "NAMES and" in one.original} == {"Thing.flush"}


def test_every_listed_equivalent_mutant_still_exists_and_has_a_reason(root: Path):
    sources = root / "src" / "sandbox"
    targets = tomllib.loads((root / "tests" / "mutation" / "targets.toml").read_text())["targets"]
    everything = {file: mutants_of(sources / file, sources) for file in targets}
    reasons, stale = equivalents_of(root, everything)
    assert stale == []
    assert [key for key, reason in reasons.items() if len(reason) < 20] == []
    assert {place for places in targets.values() for place in places if not (root / "tests" / place).exists()} == set()


# The script on a project of one module


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
    with open(os.environ["LEFT_BEHIND"], "a") as file:
        print(child.pid, file=file)
    assert [count_down(number) for number in (0, 1, 3)] == [0, 1, 3]
"""


class Project:
    """A checkout with one module, and what it takes to run the script in it."""

    def __init__(self, directory: Path, root: Path) -> None:
        self.checkout, self.temporary, self.left = (directory / name for name in ("checkout", "tmp", "left"))
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
        self.left.touch()

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
            **{"PYTHONPATH": str(self._root / "tests"), "TMPDIR": str(self.temporary), "LEFT_BEHIND": str(self.left)},
        }
        command = [sys.executable, "-c", code, str(self.checkout), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str) -> tuple[int, str]:
        with self.start(*arguments) as running:
            said, _ = running.communicate(timeout=100)
        return running.returncode, said

    def contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.checkout.rglob("*") if path.is_file()}

    def assert_nothing_is_left(self) -> None:
        assert list(self.temporary.iterdir()) == []
        children = [int(pid) for pid in self.left.read_text().split()]
        assert children, "the tests have started some"
        assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Project:
    return Project(tmp_path, root)


def test_all_mutants_of_a_tested_module_are_killed_also_one_that_loops_and_nothing_is_left(project):
    before = project.contents()
    code, said = project.run("--sample", "0", "--seed", "7")
    lines = said.splitlines()
    assert lines[0].startswith("seed 7: ")
    assert "1 equivalent ones left out; seed 7" in lines[-1]
    assert (code, "100.0 %" in lines[-1]) == (0, True), said
    assert project.contents() == before
    project.assert_nothing_is_left()


def test_a_survivor_is_shown_and_a_score_below_the_minimum_is_a_failure(project):
    project.write("tests/mutation/equivalents.toml", "")
    code, said = project.run("tiny.py:3", "--sample", "0", "--seed", "7", "--minimum", "99")
    assert code == 1
    assert "tiny.py:3 in clamp (comparison, occurrence 1)" in said
    assert "  - if number > highest:\n  + if (number >= highest):\n" in said
    assert project.run("tiny.py:3", "--sample", "0", "--minimum", "1")[0] == 0


def test_an_equivalent_that_is_there_no_longer_is_told(project):
    project.write("src/sandbox/tiny.py", MODULE.replace("number > highest", "highest < number"))
    code, said = project.run("tiny.py:4", "--minimum", "0")
    assert code == 1
    assert "stale: tiny.py has no such mutant any more: if number > highest:" in said


def test_nothing_is_judged_by_tests_that_fail_anyway(project):
    project.write("tests/test_tiny.py", TESTS + "\ndef test_no():\n    assert False\n")
    with project.start("--sample", "1") as running:
        running.communicate(timeout=100)
    assert running.returncode == 1
    assert list(project.temporary.iterdir()) == []


def test_a_run_that_is_ended_leaves_nothing(project):
    project.write("tests/test_tiny.py", TESTS + "\ndef test_long():\n    import time\n    time.sleep(60)\n")
    with project.start("--sample", "0") as running:
        deadline = time.monotonic() + 60
        while not project.left.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    assert running.returncode != 0
    project.assert_nothing_is_left()
