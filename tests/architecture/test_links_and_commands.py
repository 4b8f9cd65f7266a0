"""Links and anchors in the documentation are valid, every page is listed, and the tutorial's commands parse."""

import ast
import re
import shlex
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from sandbox.cli.main import root as command_line

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("docs/**/*.md"),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "ARCHITECTURE", "CHANGELOG")),
]
DOCUMENT_NAMES = sorted(str(path.relative_to(ROOT)) for path in DOCUMENTS)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r'\b(?:src|srcset)="(?!https?:)([^"]+)"')
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")


def prose(text: str) -> str:
    """Return the page without code blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page: explicit anchors, and the ones that GitHub generates for headings."""
    counts: Counter[str] = Counter()
    slugs = set(re.findall(r'<a id="([^"]+)"></a>', prose(text)))
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
        visible = re.sub(r"\]\([^)]*\)", "]", heading)
        slug = re.sub(r"[^\w\- ]", "", visible.lower()).replace(" ", "-")
        slugs.add(slug if not counts[slug] else f"{slug}-{counts[slug]}")
        counts[slug] += 1
    return slugs


def broken_links(page: Path) -> list[str]:
    """Return the relative links on a page that point to a missing file or heading."""
    invalid = []
    text = prose(page.read_text())
    for link in LINK.findall(text) + IMAGE.findall(text):
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            invalid.append(link)
    return invalid


@pytest.mark.parametrize("name", DOCUMENT_NAMES)
def test_links_and_anchors_exist(name: str):
    assert broken_links(ROOT / name) == []


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("other.md", False),
        ("other.md#its-part-2", False),
        ("other.md#its-part-2-1", False),
        ("#here", False),
        ("https://example.org/nowhere", False),
        ("nowhere.md", True),
        ("other.md#another-part", True),
        ("other.md#its-part-2-2", True),
        ("#in-code", True),
    ],
)
def test_broken_link_is_detected(tmp_path: Path, link: str, is_broken: bool):
    (tmp_path / "other.md").write_text("# Its part, 2\n\n## Its `part`, 2\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n```sh\n# In code\n```\n\nSee [it]({link}), not `[code](missing.md)`.\n")
    assert broken_links(page) == ([link] if is_broken else [])


SOURCE_LINK_WITH_SYMBOLS = re.compile(
    r"\]\((\.\./src/sandbox/[^)]+\.py)\)(?:,| \|) (`[\w.]+`(?:(?:, | and | or )`[\w.]+`)*)"
)


def missing_symbols(page: Path) -> list[str]:
    """Return the symbols that a page names after a link to a module but that the module does not define."""
    return [
        f"{module}: {name}"
        for module, names in SOURCE_LINK_WITH_SYMBOLS.findall(page.read_text())
        for name in re.findall(r"`([\w.]+)`", names)
        if not is_defined(name, ast.parse((page.parent / module).read_text()).body)
    ]


def is_defined(dotted_name: str, body: list[ast.stmt]) -> bool:
    """Return whether the statements define a name such as `Class.method`. An inherited method does not count.

    A name without a class is also searched for in classes.
    """
    first, _, rest = dotted_name.partition(".")
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if statement.name == first:
                return not rest or is_defined(rest, statement.body)
            if isinstance(statement, ast.ClassDef) and not rest and is_defined(first, statement.body):
                return True
        elif not rest and any(
            isinstance(node, ast.Name) and node.id == first and isinstance(node.ctx, ast.Store)
            for node in ast.walk(statement)
        ):
            return True
    return False


@pytest.mark.parametrize("name", ["docs/code-tour.md", "docs/recipes.md"])
def test_named_symbols_exist(name: str):
    assert len(SOURCE_LINK_WITH_SYMBOLS.findall((ROOT / name).read_text())) > 10
    assert missing_symbols(ROOT / name) == []


REPOSITORY_FILE_PATTERN = re.compile(
    r"(?<![\w/.-])((?:tests|src|docs|script|packaging)/[\w/.-]+\.(?:py|md|html|js|css|toml))"
)


def missing_paths(page: Path) -> list[str]:
    """Return the paths of repository files that a page names but that do not exist."""
    return [path for path in REPOSITORY_FILE_PATTERN.findall(page.read_text()) if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", ["docs/code-tour.md", "docs/recipes.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_named_files_exist(name: str):
    assert missing_paths(ROOT / name) == []


def test_package_tree_names_existing_packages_and_modules():
    [tree] = re.findall(
        r"^```\nsrc/sandbox/\n(.*?)^```", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE | re.DOTALL
    )
    files = [path.relative_to(ROOT / "src") for path in (ROOT / "src/sandbox").rglob("*.py")]
    known = {f"{parent.name}/" for file in files for parent in file.parents} | {file.name for file in files}
    named = re.findall(r"(?<![\w/.-])[a-z_]+(?:\.py|/)", re.sub(r"\(docs/[^)]*\)", "", tree))
    [server_modules] = re.findall(r"server/ +([a-z_,\s]+?)\n +runner/", tree)
    named += [f"{name}.py" for name in re.split(r",\s+", server_modules)]
    assert len(named) > 60
    assert [name for name in named if name not in known] == []


def test_missing_file_is_detected(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("Run `pytest tests/unit/nowhere/test_nothing.py` and read `docs/index.md`.")
    assert missing_paths(page) == ["tests/unit/nowhere/test_nothing.py"]


def called_names(function: ast.AST) -> list[str]:
    """Return the names that a function calls, in the order in which the calls end in the source."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.end_lineno, call.end_col_offset))
    return [getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls]


def listed_functions(tour: str) -> list[str]:
    """Return the functions that the rows of the tour list."""
    rows = re.findall(r"^\| \[.*?\) \| (.*?) \|", tour, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]


def misplaced_rows(tour: str, module: Path, function: str) -> list[str]:
    """Return the functions that a function calls later than the tour lists them. Names that occur twice are ignored."""
    names = [name.rpartition(".")[2] for name in listed_functions(tour)]
    [definition] = [
        node
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
    ]
    called = [name for name in dict.fromkeys(called_names(definition)) if names.count(name) == 1]
    assert called
    expected = sorted(called, key=names.index)
    return [name for name, other in zip(called, expected, strict=True) if name != other]


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("api/authentication.py", "check_host_and_origin"),
        ("bootstrap/runner.py", "_run_attempt"),
        ("gateway/model_api/connection_protocol.py", "_forward_pending"),
        ("gateway/model_api/connection_protocol.py", "upstream_data_received"),
        ("runner/steps/run.py", "supervise"),
        ("server/submissions.py", "_accept"),
        ("workspace/diff/patch.py", "_write_patch"),
    ],
)
def test_tour_lists_calls_in_their_order(module: str, function: str):
    tour = (ROOT / "docs" / "code-tour.md").read_text()
    assert misplaced_rows(tour, ROOT / "src" / "sandbox" / module, function) == []


TOUR_ORDER = [
    ("check_params", "submit_task", "_submit", "read_body"),
    ("LocalPlacement.launch", "FileJournals.hand_over", "FileJournalWriter.hand_over", "RunnerForkServer.start"),
    ("_take_over_journal", "_create_driver", "build_runner"),
    ("ConfinedClone.run", "_over_http", "SocksProxy.serving", "Git.run"),
    ("RunStep.run", "create_gateway", "RunStep._create_agent_run", "_AgentRun.supervise", "_AgentRun._start_agent"),
    ("_start_request", "ModelProtocol._handle_body", "_finish_body", "_forward_pending", "ModelRequestGate.check_body"),
    ("ModelRequestGate.check_body", "ModelProtocol._forward", "ModelProtocol.upstream_data_received"),
    ("_start_response", "_forward_body", "StreamMeter.feed", "ModelProtocol._charge_usage"),
    ("_import_workspace", "compare_workspace", "FastImportWriter.put", "_write_diff"),
    ("JournalTailer._run", "Dispatcher.finish"),
]


@pytest.mark.parametrize("names", TOUR_ORDER)
def test_tour_lists_the_steps_of_a_path_in_order(names: tuple[str, ...]):
    listed = listed_functions((ROOT / "docs" / "code-tour.md").read_text())
    positions = [listed.index(name) for name in names]
    assert positions == sorted(positions)


def test_misplaced_row_is_detected(tmp_path: Path):
    module = tmp_path / "a.py"
    module.write_text("def run():\n    second(first())\n    third()\n")
    row = "| [`a.py`](../src/sandbox/a.py) | `{}` | It. |\n"
    for names, misplaced in (("first second third", []), ("second first third", ["first", "second"])):
        assert misplaced_rows("".join(row.format(name) for name in names.split()), module, "run") == misplaced


def test_missing_symbol_is_detected(tmp_path: Path):
    (tmp_path / "src" / "sandbox").mkdir(parents=True)
    (tmp_path / "src" / "sandbox" / "a.py").write_text(
        "LIMIT = 1\n\nclass Box:\n    def open(self): ...\n\nclass Bag: ...\n"
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("[`a.py`](../src/sandbox/a.py), `Box.open`, `open`, `LIMIT`, `Bag.open` and `shut`")
    assert missing_symbols(page) == ["../src/sandbox/a.py: Bag.open", "../src/sandbox/a.py: shut"]


def test_index_and_site_list_each_page(root: Path):
    pages = {path.name for path in (root / "docs").glob("*.md")}
    linked = {link.partition("#")[0] for link in LINK.findall((root / "docs" / "index.md").read_text())}
    assert pages - {"index.md"} - linked == set()
    listed = re.findall(r"docs/([\w-]+\.md)$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of each `sandbox` command in a page's shell blocks, including those in pipes and `$(…)`."""
    blocks = [body for language, body in FENCE.findall(text) if language in {"sh", "bash", "console"}]
    calls = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        call: list[str] | None = None
        is_start = True
        for word in lexer:
            if set(word) <= set("();<>|&"):
                call, is_start = None, True
            elif is_start and word == "sandbox":
                call, is_start = [], False
                calls.append(call)
            else:
                is_start = is_start and (word.endswith("$") or "=" in word)
                if call is not None:
                    call.append(word)
    return calls


def parse_error(words: list[str]) -> str | None:
    """Return the error that the CLI reports for these arguments, or None if they are valid."""
    command: click.Command | None = command_line
    rest = list(words)
    while isinstance(command, click.Group):
        if not rest or (command := command.get_command(click.Context(command), rest.pop(0))) is None:
            return f"no such command: {shlex.join(words)}"
    try:
        assert command is not None
        values, extra_arguments, _ = command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    provided = {name for name, value in values.items() if value and isinstance(value, str | tuple)}
    missing = [parameter.name for parameter in command.params if parameter.required and parameter.name not in provided]
    return f"surplus {extra_arguments}, missing {missing}" if extra_arguments or missing else None


@pytest.mark.parametrize(
    ("name", "minimum"),
    [
        ("README.md", 6),
        ("docs/tutorial.md", 12),
        ("docs/cookbook.md", 4),
        ("docs/troubleshooting.md", 2),
        ("docs/installation.md", 5),
        ("docs/network.md", 1),
        ("docs/project.md", 4),
        ("docs/configuration.md", 3),
    ],
)
def test_documented_commands_are_valid(root: Path, name: str, minimum: int):
    calls = commands((root / name).read_text())
    assert len(calls) >= minimum
    assert {shlex.join(call): invalid for call in calls if (invalid := parse_error(call))} == {}


@pytest.mark.parametrize(
    ("line", "is_valid"),
    [
        ("sandbox task submit task.yaml --follow --set vm.cpus=2", True),
        ("ID=$(sandbox task submit task.yaml)", True),
        ("FOO=1 sandbox doctor  # comment", True),
        ("sandbox task logs one | grep x", True),
        ("sandbox task submit task.yaml --folow", False),
        ("sandbox task sumbit task.yaml", False),
        ("sandbox task logs", False),
        ("sandbox task logs one two", False),
        ("echo | sandbox task logs --since", False),
    ],
)
def test_invalid_command_is_detected(line: str, is_valid: bool):
    (call,) = commands(f"```sh\n{line}\n```\n")
    assert (parse_error(call) is None) == is_valid
