"""Mutants: small changes to the source of a module, each of which a test should detect.

Types, docstrings, decorators, imports, class keywords, f-strings and prose are not mutated. Prose is a string with a
space between two words. It is not mutated because tests check codes and decisions, not every sentence.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitAnd,
}
_PROSE = re.compile(r"\w\W* \W*\w")
_EMPTY = {ast.Tuple: "()", ast.List: "[]", ast.Dict: "{}", ast.Set: "set()"}

Span = tuple[int, int, int, int]
"""Line and column of the start and of the end. Columns are in UTF-8 bytes."""


@dataclass(frozen=True)
class Mutant:
    """One change to one file.

    file: relative to the source root. original, mutated: the changed lines. scope: the class or function around them.
    occurrence: the position among equal changes in this scope.
    runs_at_import: the code runs while its module is imported.
    """

    file: str
    line: int
    last_line: int
    scope: str
    operator: str
    original: str
    mutated: str
    source: str
    runs_at_import: bool
    occurrence: int = 1

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """Identifies the mutant as long as its lines are unchanged."""
        return self.file, self.scope, self.original, self.mutated, self.occurrence


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    source = path.read_text()
    candidates = _Finder(source, str(path.relative_to(root))).mutants()
    unique = {mutant.source: mutant for mutant in candidates if mutant.source != source}
    counts: Counter[tuple[str, str, str]] = Counter()
    numbered = []
    for mutant in sorted(unique.values(), key=lambda mutant: (mutant.line, mutant.last_line)):
        occurrence_key = mutant.scope, mutant.original, mutant.mutated
        counts[occurrence_key] += 1
        numbered.append(replace(mutant, occurrence=counts[occurrence_key]))
    return numbered


class _Finder:
    def __init__(self, source: str, file: str) -> None:
        self._file = file
        self._bytes = source.encode()
        self._tree = ast.parse(source)
        self._line_starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def mutants(self) -> Iterator[Mutant]:
        return self._visit(self._tree, scope=(), runs_at_import=True)

    def _visit(self, node: ast.AST, *, scope: tuple[str, ...], runs_at_import: bool) -> Iterator[Mutant]:
        for operator, span, text in _changes(node):
            mutant = self._mutant(span, text, operator, ".".join(scope), runs_at_import=runs_at_import)
            if mutant is not None:
                yield mutant
        for child, is_inside in _children(node):
            inner = (*scope, node.name) if is_inside and not isinstance(node, ast.Lambda) else scope
            is_run = is_inside and not isinstance(node, ast.ClassDef)
            yield from self._visit(child, scope=inner, runs_at_import=runs_at_import and not is_run)

    def _mutant(self, span: Span, text: str, operator: str, scope: str, *, runs_at_import: bool) -> Mutant | None:
        line, column, last_line, last_column = span
        start, end = self._line_starts[line - 1] + column, self._line_starts[last_line - 1] + last_column
        changed = self._bytes[:start] + text.encode() + self._bytes[end:]
        first, last = self._line_starts[line - 1], self._line_starts[last_line]
        try:
            ast.parse(changed)
        except SyntaxError:
            return None
        return Mutant(
            file=self._file,
            line=line,
            last_line=last_line,
            scope=scope,
            operator=operator,
            original=_normalize_whitespace(self._bytes[first:last]),
            mutated=_normalize_whitespace(changed[first : last + len(changed) - len(self._bytes)]),
            source=changed.decode(),
            runs_at_import=runs_at_import,
        )


def _normalize_whitespace(text: bytes) -> str:
    return " ".join(text.decode().split())


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """Yield each child of a node that may be mutated, and whether it is in the body of a function, class or lambda."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Expr(value=ast.Constant()):
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from ((default, False) for default in _defaults(node.args))
            yield from ((statement, True) for statement in node.body)
        case ast.Lambda(args=args, body=body):
            yield from ((default, False) for default in _defaults(args))
            yield body, True
        case ast.ClassDef(body=body):
            yield from ((statement, True) for statement in body)
        case ast.Assign(value=value) | ast.AnnAssign(value=value):
            if value is not None and not _is_type(value):
                yield value, False
        case ast.AugAssign(value=value):
            yield value, False
        case ast.Subscript(value=value) if _is_type(node):
            yield value, False
        case _:
            yield from ((child, False) for child in ast.iter_child_nodes(node))


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None]


def _is_type(node: ast.expr) -> bool:
    """Return whether an expression is a type: its name is capitalized, or it is a built-in type with brackets."""
    match node:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _is_type(left) and (_is_type(right) or _is_none(right))
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            built_in = {"dict", "list", "set", "tuple", "frozenset", "type"}
            return name != "Annotated" and (name in built_in or re.match(r"_?[A-Z][a-z]", name) is not None)
        case ast.Name(id=name):
            return re.match(r"_?[A-Z][a-z]", name) is not None
    return False


def _is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _span(node: ast.AST) -> Span:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


Change = tuple[str, Span, str]
"""Operator, span to replace, replacement text."""


def _changes(node: ast.AST) -> Iterator[Change]:
    change = _OPERATORS.get(type(node))
    if change is not None:
        yield from change(node)
    if _is_removable(node):
        yield "statement", _span(node), "pass"


def _is_removable(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()):
            return False
        case ast.Assign(value=value) | ast.AnnAssign(value=value):
            return value is not None and not _is_type(value)
    return isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete)


def _comparisons(node: ast.Compare) -> Iterator[Change]:
    for index, op in enumerate(node.ops):
        for other in _COMPARISONS[type(op)]:
            ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
            yield "comparison", _span(node), f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"


def _and_or(node: ast.BoolOp) -> Iterator[Change]:
    other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    yield "boolean", _span(node), f"({ast.unparse(ast.BoolOp(other, node.values))})"


def _signs(node: ast.UnaryOp) -> Iterator[Change]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield "negation", _span(node), f"({ast.unparse(node.operand)})"


def _operations(node: ast.BinOp) -> Iterator[Change]:
    """Reduce `a | b` to one operand; replace an arithmetic operator with another."""
    if isinstance(node.op, ast.BitOr):
        yield "operand", _span(node), f"({ast.unparse(node.left)})"
        yield "operand", _span(node), f"({ast.unparse(node.right)})"
    elif type(node.op) in _ARITHMETIC:
        other = ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
        yield "arithmetic", _span(node), f"({ast.unparse(other)})"


def _assigned_operations(node: ast.AugAssign) -> Iterator[Change]:
    if type(node.op) in _ARITHMETIC:
        other = ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)
        yield "arithmetic", _span(node), ast.unparse(other)


def _constants(node: ast.Constant) -> Iterator[Change]:
    yield from (("constant", _span(node), text) for text in _other_constants(node.value))


def _other_constants(value: object) -> Iterator[str]:
    match value:
        case bool():
            yield repr(not value)
        case int():
            yield repr(value + 1)
            yield f"({value - 1!r})"
        case float():
            yield repr(value + 1)
        case str() if not _PROSE.search(value):
            yield repr(f"XX{value}")
        case bytes():
            yield repr(b"XX" + value)


def _elements(node: ast.Dict | ast.Set | ast.Tuple | ast.List) -> Iterator[Change]:
    """Remove one element without changing the lines of the others."""
    if isinstance(node, ast.Tuple | ast.List) and not isinstance(node.ctx, ast.Load):
        return
    if isinstance(node, ast.Dict):
        rows = zip(node.keys, node.values, strict=True)
        spans = [(*_span(key or value)[:2], *_span(value)[2:]) for key, value in rows]
    else:
        spans = [_span(element) for element in node.elts]
    if len(spans) == 1:
        yield "element", _span(node), _EMPTY[type(node)]
        return
    is_pair = isinstance(node, ast.Tuple) and len(spans) == 2
    for index, (line, column, *_) in enumerate(spans[:-1]):
        if is_pair:
            yield "element", (line, column, *spans[1][2:]), f"{ast.unparse(node.elts[1])},"
        else:
            yield "element", (line, column, *spans[index + 1][:2]), ""
    if spans:
        yield "element", (*spans[-2][2:], *spans[-1][2:]), "," if is_pair else ""


def _loops(node: ast.Break | ast.Continue) -> Iterator[Change]:
    yield "loop", _span(node), "continue" if isinstance(node, ast.Break) else "break"


def _returns(node: ast.Return) -> Iterator[Change]:
    """Replace the returned value with None, except a falsy constant: most callers treat False and None alike."""
    is_false = isinstance(node.value, ast.Constant) and not node.value.value
    if node.value is not None and not is_false:
        yield "return", _span(node), "return None"


def _caught(node: ast.ExceptHandler) -> Iterator[Change]:
    if node.type is not None:
        yield "exception", _span(node.type), "FloatingPointError"


def _raised(node: ast.Raise) -> Iterator[Change]:
    if isinstance(node.exc, ast.Call):
        yield "exception", _span(node.exc.func), "FloatingPointError"


def _conditions(node: ast.If | ast.While | ast.IfExp | ast.Assert) -> Iterator[Change]:
    yield from _negations([node.test])


def _filters(node: ast.comprehension) -> Iterator[Change]:
    yield from _negations(node.ifs)


def _negations(conditions: list[ast.expr]) -> Iterator[Change]:
    """Negate the conditions that no other operator negates."""
    for condition in conditions:
        if not isinstance(condition, ast.UnaryOp | ast.Constant) and not (
            isinstance(condition, ast.Compare) and len(condition.ops) == 1
        ):
            yield "condition", _span(condition), f"(not ({ast.unparse(condition)}))"


_OPERATORS: dict[type[ast.AST], Callable[[Any], Iterator[Change]]] = {
    ast.Assert: _conditions,
    ast.AugAssign: _assigned_operations,
    ast.BinOp: _operations,
    ast.BoolOp: _and_or,
    ast.Break: _loops,
    ast.Compare: _comparisons,
    ast.Constant: _constants,
    ast.Continue: _loops,
    ast.Dict: _elements,
    ast.ExceptHandler: _caught,
    ast.If: _conditions,
    ast.IfExp: _conditions,
    ast.List: _elements,
    ast.Raise: _raised,
    ast.Return: _returns,
    ast.Set: _elements,
    ast.Tuple: _elements,
    ast.UnaryOp: _signs,
    ast.While: _conditions,
    ast.comprehension: _filters,
}
