"""Links and anchors lead somewhere, every page is found, and the commands that newcomers type are understood."""

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
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCUMENTS)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links and `#` is no heading."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
        spoken = re.sub(r"\]\([^)]*\)", "]", heading)
        slug = re.sub(r"[^\w\- ]", "", spoken.lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading."""
    wrong = []
    for link in LINK.findall(prose(page.read_text())):
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(name: str):
    assert broken(ROOT / name) == []


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
def test_a_broken_link_is_found(tmp_path: Path, link: str, is_broken: bool):
    (tmp_path / "other.md").write_text("# Its part, 2\n\n## Its `part`, 2\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n```sh\n# In code\n```\n\nSee [it]({link}), not `[code](missing.md)`.\n")
    assert broken(page) == ([link] if is_broken else [])


def test_the_index_and_the_site_have_every_page(root: Path):
    pages = {path.name for path in (root / "docs").glob("*.md")}
    linked = {link.partition("#")[0] for link in LINK.findall((root / "docs" / "index.md").read_text())}
    assert pages - {"index.md"} - linked == set()
    listed = re.findall(r"docs/([\w-]+\.md)$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def commands(text: str) -> list[list[str]]:
    """The words of every call of `sandbox` in the shell blocks of a page, also behind pipes and in `$(…)`."""
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


def misunderstood(words: list[str]) -> str | None:
    """What the real command line has against these words; None when it takes them."""
    command: click.Command | None = command_line
    rest = list(words)
    while isinstance(command, click.Group):
        if not rest or (command := command.get_command(click.Context(command), rest.pop(0))) is None:
            return f"no such command: {shlex.join(words)}"
    try:
        assert command is not None
        values, surplus, _ = command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    given = {name for name, value in values.items() if value and isinstance(value, str | tuple)}
    missing = [one.name for one in command.params if one.required and one.name not in given]
    return f"surplus {surplus}, missing {missing}" if surplus or missing else None


@pytest.mark.parametrize(("name", "least"), [("README.md", 6), ("docs/tutorial.md", 12)])
def test_every_command_that_a_newcomer_types_is_understood(root: Path, name: str, least: int):
    calls = commands((root / name).read_text())
    assert len(calls) >= least
    assert {shlex.join(call): wrong for call in calls if (wrong := misunderstood(call))} == {}


@pytest.mark.parametrize(
    ("line", "is_understood"),
    [
        ("sandbox task submit task.yaml --follow --set vm.cpus=2", True),
        ("ID=$(sandbox task submit task.yaml)", True),
        ("FOO=1 sandbox doctor  # a word", True),
        ("sandbox task logs one | grep x", True),
        ("sandbox task submit task.yaml --folow", False),
        ("sandbox task sumbit task.yaml", False),
        ("sandbox task logs", False),
        ("sandbox task logs one two", False),
        ("echo | sandbox task logs --since", False),
    ],
)
def test_a_command_with_a_mistake_is_found(line: str, is_understood: bool):
    (call,) = commands(f"```sh\n{line}\n```\n")
    assert (misunderstood(call) is None) == is_understood
