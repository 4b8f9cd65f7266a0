"""The documentation lists every error, manifest field and setting."""

import ast
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sandbox.agents import registered_agents
from sandbox.bootstrap.settings.keys import setting_keys
from sandbox.bootstrap.settings.load import load
from sandbox.client import Client
from sandbox.images.profiles import read_definition
from sandbox.model.failure import FailureCode, FailureReason
from sandbox.model.manifest.parser import parse_manifest
from sandbox.model.manifest.schema import declare_manifest

SMALLEST_MANIFEST = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/app.git", "branch": "main"},
    "claude": {"prompt": "Work."},
}


def rows(document: Path) -> list[list[str]]:
    """Return the rows of all tables, without the header rows."""
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in document.read_text().splitlines()
        if line.startswith("| `")
    ]
    assert cells
    return cells


def codes_in(tree: ast.AST) -> Iterator[str]:
    """Yield the error codes in a module: those in error classes, calls, responses and events."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(body=body):
                for statement in body:
                    match statement:
                        case ast.Assign(targets=[ast.Name("code")], value=ast.Constant(str(code))):
                            yield code
                        case ast.AnnAssign(target=ast.Name("code"), value=ast.Constant(str(code))):
                            yield code
            case ast.Call(
                func=ast.Name("ErrorReported") | ast.Attribute(attr="ErrorReported" | "report_error"),
                args=[first, *_],
            ):
                if isinstance(first, ast.Constant):
                    yield str(first.value)
            case ast.Call(func=ast.Name("problem"), args=[_, _, ast.Constant(str(code)), *_]):
                yield code
            case ast.keyword(arg="code", value=ast.Constant(str(code))):
                yield code


def test_each_error_is_listed(root: Path, trees: dict[Path, ast.Module]):
    used = {code for tree in trees.values() for code in codes_in(tree)} | {str(code) for code in FailureCode}
    used |= {str(reason) for reason in FailureReason}
    assert {"invalid_manifest", "forbidden", "unreachable", "model_retry", "upstream_unreachable"} <= used
    listed = {row[0].strip("`") for row in rows(root / "docs" / "errors.md")}
    assert listed - used == set()
    assert used - listed == set()


def test_each_error_has_an_anchor(root: Path):
    page = (root / "docs" / "errors.md").read_text()
    codes = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    anchors = re.findall(r"^\| `\w+` \| <a id=\"([\w-]+)\"></a>", page, re.MULTILINE)
    assert [anchor.partition("-")[0] for anchor in anchors] == codes
    assert len(set(anchors)) == len(anchors)
    assert set(codes) <= set(anchors)


def test_each_failure_code_has_advice(root: Path):
    section = (root / "docs" / "errors.md").read_text().split("## Why tasks fail")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| [^|]+\. \| ([^|]+)\. \|$", section, re.MULTILINE))
    assert set(documented) == {str(code) for code in FailureCode}


MANIFEST = declare_manifest({agent.kind: agent.section_type for agent in registered_agents().values()})


def fields(record: Any = MANIFEST, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field of the manifest with its documented default."""
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        field_type = hints[field.name]
        if typing.get_origin(field_type) in {typing.Union, types.UnionType}:
            field_type = next(member for member in typing.get_args(field_type) if member is not type(None))
        name = path + field.name
        yield name, default(field)
        if dataclasses.is_dataclass(field_type):
            yield from fields(field_type, f"{name}.")
            continue
        arguments = typing.get_args(field_type)
        if typing.get_origin(field_type) is tuple and dataclasses.is_dataclass(arguments[0]):
            yield from fields(arguments[0], f"{name}[].")
        if typing.get_origin(field_type) is dict and dataclasses.is_dataclass(arguments[1]):
            yield from fields(arguments[1], f"{name}.NAME.")


def default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    literals: dict[Any, str] = {True: "true", False: "false"} if isinstance(value, bool) else {(): "[]", "": '""'}
    if dataclasses.is_dataclass(value) or value == {}:
        return "`{}`"
    return f"`{literals.get(value, value)}`"


def test_each_manifest_field_is_listed_with_its_default(root: Path):
    page = root / "docs" / "manifest.md"
    sections = {
        name: text.partition(".")[0] for name, text in re.findall(r"^### (\w+)\n\n(.+)", page.read_text(), re.MULTILINE)
    }
    listed = [(row[0].strip("`"), row[2]) for row in rows(page) if len(row) == 3]
    mappings = {field.name for field in dataclasses.fields(MANIFEST)} - {name for name, _ in listed}
    assert listed == [(name, value) for name, value in fields() if name not in mappings]
    documented = {name: sections[name] == "Required" for name in mappings}
    assert documented == {name: value == "required" for name, value in fields() if name in mappings}
    assert {*sections.values()} == {"Required", "Optional"}


def test_each_manifest_field_is_described_by_a_sentence(root: Path):
    descriptions = [row[1] for row in rows(root / "docs" / "manifest.md")]
    assert [text for text in descriptions if not re.match(r"[A-Z][a-z]* .+\.$", text)] == []


def test_each_setting_is_listed_with_its_default_and_variable_and_option(root: Path):
    keys = re.compile(r"`[a-z]+\.[a-z_.]+`")
    table = [row for row in rows(root / "docs" / "configuration.md") if keys.fullmatch(row[0])]
    listed = [[cell.strip("`") for cell in row] for row in table]
    assert listed == [
        [key.path, key.default_text, key.variable, key.option or "none", key.description] for key in setting_keys()
    ]


def test_configuration_example_is_valid(root: Path, tmp_path: Path):
    example = re.search(r"```toml\n(.*?)```", (root / "docs" / "configuration.md").read_text(), re.DOTALL)
    assert example
    (tmp_path / "sandbox.toml").write_text(example[1])
    assert load({"config": str(tmp_path / "sandbox.toml")}, {}).settings.git.allowed_hosts[0] == "github.com"


def test_allowed_hosts_on_the_projects_page_are_valid(root: Path):
    page = (root / "docs" / "project.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    vm = yaml.safe_load(example)["vm"]
    manifest = {**SMALLEST_MANIFEST, "vm": vm}
    parsed = parse_manifest(json.dumps(manifest).encode(), agents=registered_agents(), is_json=True)
    assert [*parsed.vm.allowed_hosts] == vm["allowed_hosts"]


def test_documented_profile_definitions_are_valid(root: Path, tmp_path: Path):
    for name in ("profiles", "project"):
        (definition,) = re.findall(r"```toml\n(.*?)```", (root / "docs" / f"{name}.md").read_text(), re.DOTALL)
        (tmp_path / "profile.toml").write_text(definition)
        assert "git" in read_definition(tmp_path / "profile.toml").packages


def test_glossary_defines_the_architecture_terms(root: Path):
    pages = [(root / "docs" / name).read_text() for name in ("glossary.md", "code-tour.md")]
    defined = [word for page in pages for word in re.findall(r"^\| \*\*([a-z ]+)\*\* \|", page, re.MULTILINE)]
    assert len(defined) == len(set(defined))
    words = {word for page in pages for word in re.findall(r"\*\*([a-z ]+)\*\*", page)}
    used = set(re.findall(r"\*\*([a-z]+)\*\*", (root / "ARCHITECTURE.md").read_text()))
    terms = {word.removesuffix("s") if word not in words else word for word in used - {"bold"}}
    assert terms
    assert terms <= words


def test_decision_records_are_numbered_consecutively(root: Path):
    pages = sorted((root / "docs" / "adr").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences"))


def test_each_method_of_the_python_client_is_listed(root: Path):
    section = (root / "docs" / "python-client.md").read_text().split("\n## Methods\n")[1].split("\n## ")[0]
    documented = re.findall(r"^### (\w+)\n\n```text\n\1\(", section, re.MULTILINE)
    assert set(documented) == {name for name, member in vars(Client).items() if callable(member) and name[0] != "_"} - {
        "close"
    }


def test_client_and_rest_pages_use_no_deprecated_field(root: Path):
    schemas = json.loads((root / "openapi.json").read_text())["components"]["schemas"].values()
    deprecated = {
        name for one in schemas for name, field in one.get("properties", {}).items() if field.get("deprecated")
    }
    assert "task_id" in deprecated
    for page in ("python-client.md", "rest.md"):
        assert not {name for name in deprecated if f'["{name}"]' in (root / "docs" / page).read_text()}, page
