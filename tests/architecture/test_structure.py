"""The code follows ARCHITECTURE.md: layers, package and module sizes, names, and tests that mirror src."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from sandbox.agents import registered_agents

MODULES_MAX = 260
IMPLEMENTATION_MODULES_MAX = 12
MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 50
PACKAGE_MODULES_MAX = 20
SMALL_MODULE_LINES_MAX = 70
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "core", "manager"}

COMMAND_PACKAGE = "cli.commands"
"""One module per command, however short. The command line imports a command's module by name when the command runs."""

IMPLEMENTATION_PACKAGE = re.compile(r"(agents|cluster_engines|placements|runtimes)\.[^.]+(?=\.)")
"""The package of one agent, engine, placement or runtime, or a package that the runtimes share."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def line_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def module_names(root: Path) -> dict[str, Path]:
    """Return the modules, keyed by dotted name in `sandbox`. Packages have no `.__init__` suffix."""
    package = root / "src" / "sandbox"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in package.rglob("*.py")
    }


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the package's modules that `name` imports, including imports in functions and for type checkers."""
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("sandbox")):
            parent = (node.module or "").removeprefix("sandbox").lstrip(".")
            if node.level:  # a relative import: programs in a guest have no package `sandbox`
                parent = f"{name.rpartition('.')[0]}.{parent}".rstrip(".")
            for alias in node.names:
                imported = f"{parent}.{alias.name}".lstrip(".")
                yield imported if imported in known else parent
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("sandbox.") for alias in node.names if "sandbox." in alias.name)


def test_imports_follow_the_layers(root: Path):
    completed = subprocess.run(
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
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", completed.stdout)


HOST_DETAILS = re.compile(
    r"lock_fd|hand_over|flock|fcntl|pidfd|/proc\b|boot_id|\.sock\b|runner_socket|run_dir"
    r"|AttemptLayout|attempts_root|\.attempts?\(|runner_log|disk_image|LeftoverSource|RLIMIT"
)


def test_server_does_not_depend_on_the_host_that_runs_attempts(root: Path):
    """The server reaches runners only through `interfaces.placement`, because runners can be on another host.

    The server uses no descriptors, sockets, /proc, boot ids, process limits, run directory or attempt files. Only
    components on the host that runs the attempts use them. The server's own data directory, with the journals and
    artifacts of all hosts, is on the server's host.
    """
    found = {
        f"{name}: {detail[0]}"
        for name, path in module_names(root).items()
        if name.startswith("server.")
        for detail in HOST_DETAILS.finditer(path.read_text())
    }
    assert found == set()
    assert HOST_DETAILS.search((root / "src/sandbox/placements/local/placement.py").read_text())


def test_server_has_a_type_for_each_owner_of_a_journal(root: Path):
    """The writer is represented by a `JournalOwner` from `server.tracked_task`, not by an optional recorder."""
    sources = {name: path.read_text() for name, path in module_names(root).items() if name.startswith("server.")}
    assert [
        name for name, source in sources.items() if re.search(r"recorder is (not )?None|Recorder \| None", source)
    ] == []


def test_there_are_no_import_cycles(root: Path):
    known = module_names(root)
    graph = {name: {target for target in imports(name, known) if target in known} - {name} for name in known}
    # Repeatedly remove modules that import none of the remaining ones, until only cycles are left.
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert {name: sorted(targets & graph.keys()) for name, targets in graph.items()} == {}


def test_modules_are_not_too_long(modules: list[Path]):
    lengths = {str(path): len(path.read_text().splitlines()) for path in modules}
    assert {path: length for path, length in lengths.items() if length > MODULE_LINES_MAX} == {}


def test_number_of_modules_does_not_grow(root: Path):
    """A new module needs its own concept; otherwise its code belongs in the module that uses it.

    Command modules are not counted. Each agent, engine, placement and runtime has its own limit.
    """
    names = [
        name
        for name, path in module_names(root).items()
        if path.name != "__init__.py" and not name.startswith(COMMAND_PACKAGE)
    ]
    implementations = [IMPLEMENTATION_PACKAGE.match(name) for name in names]
    modules_by_package = Counter(match[0] for match in implementations if match)
    assert implementations.count(None) <= MODULES_MAX
    assert max(modules_by_package.values()) <= IMPLEMENTATION_MODULES_MAX, modules_by_package
    assert {
        "agents.claude_code",
        "cluster_engines.slurm",
        "placements.local",
        "runtimes.qemu",
    } <= modules_by_package.keys()


def test_packages_do_not_contain_too_many_modules(root: Path):
    names = (name for name, path in module_names(root).items() if path.name != "__init__.py")
    widths = Counter(name.rpartition(".")[0] for name in names)
    assert {package: width for package, width in widths.items() if width > PACKAGE_MODULES_MAX} == {}


def test_short_modules_have_more_than_one_importer(root: Path):
    known = module_names(root)
    importers: dict[str, set[str]] = defaultdict(set)
    for name in known:
        for target in imports(name, known):
            importers[target].add(name)
    found = {
        name
        for name, path in known.items()
        if path.name != "__init__.py"
        and len(path.read_text().splitlines()) < SMALL_MODULE_LINES_MAX
        and len(importers[name]) == 1
        and not name.startswith(COMMAND_PACKAGE)
    }
    assert found == set()


def test_functions_are_not_too_long(trees: dict[Path, ast.Module]):
    too_long = [
        f"{path}:{function.lineno} {function.name}"
        for path, tree in trees.items()
        for function in functions(tree)
        if line_count(function) > FUNCTION_LINES_MAX
    ]
    assert too_long == []


def test_each_module_has_a_docstring(trees: dict[Path, ast.Module]):
    assert [str(path) for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def broken_sentences(tree: ast.Module) -> Iterator[str]:
    """Yield docstring paragraphs that continue a sentence from the previous paragraph."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from re.findall(r"[^.:!?)`\s]\s*\n[ \t]*\n\s*([a-z].*)", node.value.value)


def test_docstrings_have_no_blank_line_in_a_sentence(root: Path, trees: dict[Path, ast.Module]):
    tests = {path: ast.parse(path.read_text()) for path in sorted((root / "tests").rglob("*.py"))}
    assert {str(path): found for path, tree in (trees | tests).items() if (found := [*broken_sentences(tree)])} == {}


def test_broken_sentence_is_found():
    source = '"""One sentence that\n\n    goes on."""\n\ndef f():\n    """Whole.\n\n    size: in bytes.\n    """\n'
    assert [*broken_sentences(ast.parse(source))] == ["goes on."]


def test_no_module_has_a_meaningless_name(modules: list[Path]):
    names = {part.removesuffix(".py") for path in modules for part in path.relative_to(path.parents[-2]).parts}
    assert names & MEANINGLESS_NAMES == set()


def test_source_has_no_type_ignore_comments(modules: list[Path]):
    assert [str(path) for path in modules if re.search(r"#\s*type:\s*ignore", path.read_text())] == []


def test_unit_and_integration_tests_are_named_after_a_module(root: Path):
    known = module_names(root)
    misplaced = []
    for kind in ("unit", "integration"):
        tests = root / "tests" / kind
        for path in sorted(tests.rglob("test_*.py")):
            package = ".".join(path.parent.relative_to(tests).parts)
            topic = path.stem.removeprefix("test_")
            names = [topic[:end] for end in range(1, len(topic) + 1) if end == len(topic) or topic[end] == "_"]
            # In a command package, one test module may cover the whole package.
            if not any(f"{package}.{name}" in known for name in names) and topic != "commands":
                misplaced.append(str(path.relative_to(root)))
    assert misplaced == []


# A runner must not load libraries that only the server needs: they would cost every task memory and startup time.
SERVER_LIBRARIES = (
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx2",
    "yaml",
    "click",
    "rich",
    "anyio",
    "websockets",
)


def loaded_libraries(*names: str) -> str:
    script = f"import sys, {', '.join(names)}; print(sorted(set(sys.modules) & set({SERVER_LIBRARIES!r})))"
    completed = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def test_runner_does_not_load_server_libraries():
    assert loaded_libraries("sandbox.bootstrap.runner") == "[]"


def test_model_does_not_load_a_schema_library():
    names = ("manifest.schema", "task", "events", "state_machine", "wire.event_conversion")
    assert loaded_libraries(*(f"sandbox.model.{name}" for name in names)) == "[]"


# Code that only one agent needs belongs in that agent's package. The modules below name an agent for other reasons. The
# test does not search for some terms, because they do not identify an agent: the failure codes `mcp_failed` and
# `tool_unknown` are public, and MCP is an open protocol; `headless` and `output_format` are fields that every agent's
# section may have.
MODULES_THAT_NAME_AN_AGENT = {
    "api/examples.json": "recorded requests and responses for the documentation",
    "cli/commands/mcp/command.py": "how to add Sandbox's MCP server to a user's own agent",
    "cli/main.py": "the summary in the help: what Sandbox does today",
    "demo/scripted_model.py": "the API that it implements",
    "demo/walkthrough.py": "the demo's manifest, text and example repository, and the variables of the scripted model",
    "model/wire/task_bodies.py": "a public type of the Python client: the section of a task's `definition`",
}


def test_agents_are_named_in_their_packages_only(root: Path):
    package = root / "src" / "sandbox"
    packages = {path.name for path in (package / "agents").iterdir() if (path / "__init__.py").exists()}
    agents = registered_agents().values()
    assert len(agents) == len(packages)
    words = {name.partition("_")[0] for name in packages} | {agent.kind for agent in agents}
    words |= {agent.display_name.partition(" ")[0] for agent in agents}
    words |= {agent.server_variable_prefix.rstrip("_") for agent in agents}
    assert {"claude", "Claude", "ANTHROPIC"} <= words
    names = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.is_relative_to(package / "agents")
        if names.search(path.read_bytes().decode(errors="replace"))
    }
    assert found == set(MODULES_THAT_NAME_AN_AGENT)
    assert len(MODULES_THAT_NAME_AN_AGENT) <= 10


def test_python_processes_do_not_import_from_the_current_directory(trees: dict[Path, ast.Module]):
    """Commands run in checkouts, whose files may come from anyone."""
    commands = [
        node.elts
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.List | ast.Tuple) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert len(commands) > 8
    assert [ast.unparse(words[1]) for words in commands if not ast.literal_eval(words[1]).startswith("-I")] == []
