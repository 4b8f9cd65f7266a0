"""Objects own their state: dependencies are passed to constructors, and other code does not assign attributes later."""

import ast
import re
from collections.abc import Iterator, Set
from pathlib import Path

PUBLIC_METHODS_MAX = 15

WIDE_CLASSES = {
    "client.client.Client": "one method per operation of the API",
    "client.async_client.AsyncClient": "one method per operation of the API",
    "interfaces.agent.Agent": "half of its members are constants, such as the agent's name",
}
"""Classes with more public methods than the limit, inherited ones included, and the reason for each."""

DATA_CLASSES_OF_COMPONENTS = {
    "bootstrap.runner.RunnerParts": "only the composition root uses it",
    "interfaces.server_services.TaskServices": "what the server offers to routes and pages",
    "gateway.server.OutboundNetwork": "all ways out of one sandbox, for the class below it",
}
"""Data classes without methods that group several components, and the reason for each."""

OUTSIDE_ASSIGNMENTS = {
    "api.app: app.router.default": "Starlette has no parameter for it",
    "api.app: app.router.redirect_slashes": "FastAPI has no parameter for it",
    "api.app: app.state.context": "where Starlette keeps the state of an app",
    "api.http.connections: self.cycle.disconnected": "uvicorn's cycle, which its protocol updates",
    "api.http.connections: self.flow.is_held": "the flow control is a part of the protocol",
    "api.http.server: server.should_exit": "how uvicorn is stopped",
    "api.openapi: app.openapi_schema": "where FastAPI caches the schema",
    "api.stream_cache: buffer.subscriber_count": "the cache counts the subscribers of its own buffers",
    "bootstrap.log: sys.excepthook": "the interpreter's hook",
    "cli.checkout.patch_application: backup.was_interrupted": "the handler in the context that returns the backup",
    "cli.output.table: console.width": "Rich has no other way to print wide tables",
    "cli.main: error.filename": "adds a missing name to an error of the standard library",
    "cli.main: sys.stderr": "a stream that was closed by the caller",
    "cli.main: sys.stdout": "a stream that was closed by the caller",
    "dashboard.routing: app.router.default": "Starlette has no parameter for it",
    "gateway.model_api.connection_protocol: effects.close_client": "the result of the step that is being built",
    "gateway.model_api.connection_protocol: effects.close_upstream": "the result of the step that is being built",
    "gateway.model_api.connection_protocol: effects.dial": "the result of the step that is being built",
    "gateway.model_api.connection_protocol: effects.to_client": "the result of the step that is being built",
    "gateway.model_api.connection_protocol: effects.to_upstream": "the result of the step that is being built",
    "gateway.model_api.connection_protocol: inflight.has_response": "only the protocol changes its requests",
    "gateway.model_api.connection_protocol: inflight.meter": "only the protocol changes its requests",
    "gateway.model_api.connection_protocol: self._inflight.has_timed_out": "only the protocol changes its requests",
    "gateway.model_api.connection_protocol: self._inflight.interim_responses": "only the protocol changes its requests",
    "gateway.model_api.connection_protocol: self._inflight.is_sent": "only the protocol changes its requests",
    "images.oci_import: cast('Any', member).pax_headers": "tarfile has no parameter for it",
    "model.manifest.parsed_document: self._document.data": "the document that is being built",
    "model.manifest.yaml: ended.node.value": "a node of PyYAML that is being built",
    "placements.cluster.worker_server: SSLProtocol.max_size": "asyncio has no parameter for it",
    "runtimes.limits.files_without_descriptors: _libc.ptrace.argtypes": "how ctypes declares a function",
    "runtimes.limits.files_without_descriptors: _libc.ptrace.restype": "how ctypes declares a function",
    "runtimes.limits.open_files: found.posix": "the result that is being counted",
    "runtimes.limits.open_files: found.on_host_files": "the result that is being counted",
    "server.dispatcher: self._tracked_tasks[task_id].status_message": "the module that delays a task gives the reason",
    "server.dispatcher: tracked.status_message": "the module that delays a task gives the reason",
    "server.journal_tailer: tracked.published_seq": "only the tailer publishes the task's records",
    "server.journal_tailer: tracked.status_message": "the module that delays a task gives the reason",
    "server.recovery: tracked.status_message": "the module that delays a task gives the reason",
}
"""Attributes assigned on objects that belong to another module or to a public class, and the reason for each."""

_CONTAINER_NAME = re.compile("_?([a-z]+_)*dependencies")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts[path.parts.index("sandbox") + 1 :])


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a scope, excluding those of nested functions."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, _FUNCTIONS):
            yield node
            yield from own_nodes(node)


def constructed_names(scope: ast.AST) -> set[str]:
    """Return the names that are assigned the result of a call, because such objects belong to the function."""
    names = set()
    for node in own_nodes(scope):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            targets = [each for target in node.targets for each in getattr(target, "elts", [target])]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def declared_attributes(tree: ast.Module) -> set[str]:
    """Return the attributes declared by the module's private classes, whose objects are part of the module's state."""
    names = set()
    for class_ in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name.startswith("_")):
        for node in ast.walk(class_):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return names


def outside_assignments(tree: ast.Module) -> Iterator[str]:
    """Yield attributes that are assigned on an object owned by neither the assigning function nor its module."""
    declared = declared_attributes(tree)
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS))):
        owners = {"self", "cls"} | constructed_names(scope)
        for node in own_nodes(scope):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) not in owners
                and node.attr not in declared
            ):
                yield ast.unparse(node)


def callback_attributes(class_: ast.ClassDef) -> Iterator[str]:
    """Yield public attributes that hold a function but are not set from a constructor argument."""
    for node in ast.walk(class_):
        if isinstance(node, ast.AnnAssign) and "Callable[" in ast.unparse(node.annotation):
            target, value = node.target, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            target, value = node.targets[0], node.value
        else:
            continue
        name = ast.unparse(target)
        if (
            name.startswith("self.")
            and not name.startswith("self._")
            and (value is None or not isinstance(value, ast.Name))
        ):
            yield name


def method_names(class_: ast.ClassDef) -> set[str]:
    return {node.name for node in class_.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def base_names(class_: ast.ClassDef) -> list[str]:
    """Return the names of the base classes, without packages and type parameters."""
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in class_.bases]


def public_methods(class_: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> set[str]:
    """Return the public methods of a class, including methods inherited from base classes in `by_name`."""
    own = {name for name in method_names(class_) if not name.startswith("_")}
    bases = [by_name[name] for name in base_names(class_) if name in by_name and by_name[name] is not class_]
    return own.union(*(public_methods(base, by_name) for base in bases))


def is_data_class(class_: ast.ClassDef) -> bool:
    """Return whether a class only groups values: a tuple, struct or dataclass without methods."""
    decorators = [ast.unparse(decorator) for decorator in class_.decorator_list]
    is_grouping = not {"NamedTuple", "Struct"}.isdisjoint(base_names(class_)) or any(
        "dataclass" in d for d in decorators
    )
    return is_grouping and method_names(class_) <= {"__repr__"}


def is_component(class_: ast.ClassDef) -> bool:
    """Return whether a class has behavior or state: a protocol, or a class with a constructor."""
    return "Protocol" in base_names(class_) or "__init__" in method_names(class_)


def component_fields(class_: ast.ClassDef, components: Set[str]) -> list[str]:
    """Return the fields of a data class that hold components, optional ones included."""
    fields = [node for node in class_.body if isinstance(node, ast.AnnAssign)]
    return [ast.unparse(field.target) for field in fields if not components.isdisjoint(names_in(field.annotation))]


def names_in(annotation: ast.expr) -> set[str]:
    """Return the names in an annotation, which may be quoted."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}


def container_uses(tree: ast.Module) -> Iterator[str]:
    """Yield attributes that are read through a dependency container, and the names of such containers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _CONTAINER_NAME.fullmatch(ast.unparse(node.value).rpartition(".")[2]):
            yield ast.unparse(node)
        elif isinstance(node, ast.ClassDef) and node.name.endswith(("Dependencies", "Parts", "Services")):
            yield node.name


def classes(trees: dict[Path, ast.Module]) -> Iterator[tuple[str, ast.ClassDef]]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"{module_name(path)}.{node.name}", node


def test_classes_have_few_public_methods(trees: dict[Path, ast.Module]):
    by_name = {class_.name: class_ for _, class_ in classes(trees)}
    wide = {name for name, class_ in classes(trees) if len(public_methods(class_, by_name)) > PUBLIC_METHODS_MAX}
    assert wide == set(WIDE_CLASSES)


def test_inherited_methods_are_counted():
    source = """
class Base(Protocol):
    def open(self): ...
    def _read(self): ...

class File(package.Base, Generic[T]):
    def close(self): ...
"""
    base, file = ast.parse(source).body
    assert public_methods(file, {"Base": base, "File": file}) == {"open", "close"}


def test_components_are_not_grouped_in_data_classes(trees: dict[Path, ast.Module]):
    components = {class_.name for _, class_ in classes(trees) if is_component(class_)}
    data_classes = {
        name: component_fields(class_, components) for name, class_ in classes(trees) if is_data_class(class_)
    }
    assert {name for name, fields in data_classes.items() if len(fields) > 1} == set(DATA_CLASSES_OF_COMPONENTS)


def test_data_class_of_components_is_detected():
    source = """
class Clock(Protocol):
    def now(self): ...

class Parts(msgspec.Struct, frozen=True):
    clock: Clock
    other: "Clock | None"
    seconds: float

@dataclass(frozen=True)
class Step:
    clock: Clock
    def run(self): ...
"""
    clock, parts, step = ast.parse(source).body
    assert [is_component(each) for each in (clock, parts, step)] == [True, False, False]
    assert [is_data_class(each) for each in (clock, parts, step)] == [False, True, False]
    assert component_fields(parts, {"Clock"}) == ["clock", "other"]


def test_attributes_of_other_objects_are_not_assigned(trees: dict[Path, ast.Module]):
    found = {f"{module_name(path)}: {target}" for path, tree in trees.items() for target in outside_assignments(tree)}
    assert found == set(OUTSIDE_ASSIGNMENTS)


def test_callbacks_are_passed_to_constructors(trees: dict[Path, ast.Module]):
    assert {name: list(found) for name, class_ in classes(trees) if (found := [*callback_attributes(class_)])} == {}


def test_components_are_not_accessed_through_a_dependency_container(trees: dict[Path, ast.Module]):
    """Each object gets exactly the components that it uses, with two exceptions.

    The runner's composition root groups its components. Routes and pages receive the server's services as one object.
    """
    found = {f"{module_name(path)}: {use}" for path, tree in trees.items() for use in container_uses(tree)}
    assert found == {"bootstrap.runner: RunnerParts", "interfaces.server_services: TaskServices"}
    sources = {module_name(path): ast.unparse(tree) for path, tree in trees.items()}
    assert {name for name, source in sources.items() if "RunnerParts" in source} == {"bootstrap.runner"}
    users = {name.partition(".")[0] for name, source in sources.items() if re.search("TaskServices|AppContext", source)}
    assert users == {"api", "bootstrap", "dashboard", "interfaces"}


def test_uses_of_a_dependency_container_are_found():
    source = """
class StepDependencies:
    clock: object

def run(attempt, dependencies):
    attempt.dependencies.clock.now()
    dependencies.clock
    self._gc_dependencies.remove([])
    self.dependencies
"""
    uses = ["StepDependencies", "attempt.dependencies.clock", "dependencies.clock", "self._gc_dependencies.remove"]
    assert sorted(container_uses(ast.parse(source))) == sorted(uses)


def test_late_assignments_are_found():
    source = """
class Tailer:
    def __init__(self):
        self.on_end: Callable[[], None] = lambda: None
        self.on_loss: Callable[[], None]

class _State:
    count: int = 0

def connect(service, tailer, state):
    service.tailer.on_silence = print
    tailer.on_end = print
    state.count = 1
    made = Tailer()
    made.name = "own"
"""
    tree = ast.parse(source)
    assert list(outside_assignments(tree)) == ["service.tailer.on_silence", "tailer.on_end"]
    assert [*callback_attributes(tree.body[0])] == ["self.on_end", "self.on_loss"]
