"""The house stays as ARCHITECTURE.md describes it: floors, rooms, sizes, names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 40
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base", "manager"}

ROOMS_TESTED_ELSEWHERE = {"contracts": "contract", "wiring": "acceptance", "demo": "acceptance"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_imports_go_down_only(root: Path):
    linting = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert linting.returncode == 0, linting.stdout + linting.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", linting.stdout)


def test_a_module_holds_one_thing(modules: list[Path]):
    lengths = {str(path): len(path.read_text().splitlines()) for path in modules}
    assert {path: length for path, length in lengths.items() if length > MODULE_LINES_MAX} == {}


def test_a_function_does_one_thing(trees: dict[Path, ast.Module]):
    long = [
        f"{path}:{function.lineno} {function.name}"
        for path, tree in trees.items()
        for function in functions(tree)
        if lines_of(function) > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_every_module_says_what_it_is(trees: dict[Path, ast.Module]):
    assert [str(path) for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_module_has_a_name_that_says_nothing(modules: list[Path]):
    names = {part.removesuffix(".py") for path in modules for part in path.relative_to(path.parents[-2]).parts}
    assert names & EMPTY_NAMES == set()


def test_types_are_not_silenced(modules: list[Path]):
    assert [str(path) for path in modules if re.search(r"#\s*type:\s*ignore", path.read_text())] == []


def test_every_room_has_its_tests(root: Path):
    rooms = {path.parent.name for path in (root / "src" / "sandbox").glob("*/__init__.py")}
    assert {"model", "contracts", "runner", "wiring"} <= rooms
    untested = []
    for room in rooms:
        kinds = ["unit", "integration"]
        homes = [root / "tests" / kind / room for kind in kinds]
        if room in ROOMS_TESTED_ELSEWHERE:
            homes.append(root / "tests" / ROOMS_TESTED_ELSEWHERE[room])
        if not any(home.glob("test_*.py") for home in homes):
            untested.append(room)
    assert untested == []


def test_test_modules_have_names_of_their_own(root: Path):
    names = [path.name for path in (root / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# What a runner is made of must not load what only the server needs: memory and start time of every task depend on it.
SERVER_LIBRARIES = (
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "yaml",
    "click",
    "rich",
    "anyio",
    "websockets",
)


def test_a_runner_loads_nothing_of_the_servers():
    script = f"import sys, sandbox.bootstrap.runner; print(sorted(set(sys.modules) & set({SERVER_LIBRARIES!r})))"
    loading = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (loading.returncode, loading.stdout.strip()) == (0, "[]"), loading.stderr


def test_the_model_is_read_without_a_schema_library():
    names = ", ".join(f"sandbox.model.{name}" for name in ("manifest", "task", "event", "life", "frame"))
    script = f"import sys, {names}; print(sorted(set(sys.modules) & set({SERVER_LIBRARIES!r})))"
    loading = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (loading.returncode, loading.stdout.strip()) == (0, "[]"), loading.stderr
