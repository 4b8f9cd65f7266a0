"""`interfaces/` declares Protocols and the records that they exchange.

Logic belongs in the packages that implement the Protocols.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS_WITH_LOGIC = {
    "task_file_layout.TaskLayout.attempts": "the inverse of `attempt`: finds the directories that it names",
    "runtime.is_strong_enough": "the order of the tiers belongs to their names",
    "runtime.Listeners.close": "closes the fields of the record",
}
"""Functions with logic, and the reason why each is in `interfaces/`."""

LOGIC_IMPORTS = {
    "task_file_layout: base64": "the ids in file names are created in the module that defines their format",
    "task_file_layout: os": "the ids in file names are created in the module that defines their format",
}
"""Imports from the standard library that only logic needs, and the reason for each."""

DECLARATION_MODULES = {
    "__future__", "asyncio", "collections.abc", "contextlib", "dataclasses", "datetime", "enum", "pathlib", "socket",
    "typing",
}  # fmt: skip
"""Standard library modules whose types and decorators declarations need."""

_EXPRESSIONS = (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the statements of the body, without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def is_declaration(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether the function has no logic: its body is `...`, one returned expression, or field assignments.

    An expression may choose between two values, and may call a built-in function or a method of the record. It must not
    contain a loop or an `await`. Only a constructor may have several statements: field assignments, and a call that
    passes the message to the base class.
    """
    body = statements(function)
    if any(isinstance(node, (*_EXPRESSIONS, *_COMPREHENSIONS)) for each in body for node in ast.walk(each)):
        return False
    if function.name == "__init__":
        return all(isinstance(each, ast.Assign | ast.Expr) for each in body)
    return len(body) == 1 and (isinstance(body[0], ast.Return) or ast.unparse(body[0]) == "...")


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield each function with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _FUNCTIONS):
            yield f"{prefix}.{node.name}", node
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from functions(node, f"{prefix}.{node.name}")


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def interface_trees(trees: dict[Path, ast.Module]) -> dict[str, ast.Module]:
    return {path.stem: tree for path, tree in trees.items() if path.parent.name == "interfaces"}


def test_interfaces_have_no_logic(trees: dict[Path, ast.Module]):
    found = {
        name
        for module, tree in interface_trees(trees).items()
        for name, function in functions(tree, module)
        if not is_declaration(function)
    }
    assert found == set(FUNCTIONS_WITH_LOGIC)


def test_interfaces_import_only_what_declarations_need(trees: dict[Path, ast.Module]):
    found = {
        f"{module}: {name}"
        for module, tree in interface_trees(trees).items()
        for name in imported_modules(tree)
        if name not in DECLARATION_MODULES and not name.startswith(("sandbox.", "msgspec"))
    }
    assert found == set(LOGIC_IMPORTS)


def test_interfaces_use_no_implementation(trees: dict[Path, ast.Module]):
    """Interfaces exchange records from the model, and import no implementation."""
    used = {name for tree in interface_trees(trees).values() for name in imported_modules(tree)}
    assert {
        name for name in used if name.startswith("sandbox.") and name.split(".")[1] not in {"interfaces", "model"}
    } == set()


def test_functions_with_logic_are_detected():
    source = '''
class Journals(Protocol):
    def read(self, task_id):
        """Read."""
        ...

class TaskNotFoundError(Exception):
    def __init__(self, task_id):
        super().__init__(f"There is no task {task_id}.")
        self.task_id = task_id

class Usage:
    def find_exceeded_limit(self):
        if self.sockets > 10:
            return "too many"
        return ""

    def __repr__(self):
        return f"Usage({self.sockets})"

    def names(self):
        return [each.name for each in self.sockets]

def poll(measure):
    while True:
        measure()

def record(self, event):
    result = advance(event)
    return self.append(result)

async def wait(event):
    return await event
'''
    found = {name for name, function in functions(ast.parse(source), "m") if not is_declaration(function)}
    assert found == {"m.Usage.find_exceeded_limit", "m.Usage.names", "m.poll", "m.record", "m.wait"}
