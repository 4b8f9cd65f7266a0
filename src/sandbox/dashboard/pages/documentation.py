"""The documentation in the dashboard: the pages of the guide, its search, the API reference and the error reference.

The search uses a full-text table in memory, with one row for each section of the Markdown that is shipped.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.dashboard.templates import CONTENT_SECURITY_POLICY, render_page
from sandbox.model.fixed_limits import SEARCH_CHARACTERS_MAX
from sandbox.primitives import fair_client_shares

GUIDE_GROUPS: Mapping[str, Sequence[str]] = {
    "Start": ("index", "installation", "tutorial", "concepts"),
    "Use": (
        "cookbook",
        "run",
        "project",
        "secrets",
        "network",
        "profiles",
        "dashboard",
        "python-client",
        "mcp",
        "troubleshooting",
    ),
    "Operate": ("deployment", "access", "operations", "slurm", "kubernetes"),
    "Reference": (
        "manifest",
        "configuration",
        "limits",
        "cli",
        "rest",
        "rest-reference",
        "websocket",
        "metrics",
        "errors",
        "glossary",
    ),
    "Background": ("security", "runtimes", "gateway", "redaction", "chaos", "benchmarks"),
}
"""The pages in the order of the documentation's site."""

GUIDE_PAGES = frozenset(chain.from_iterable(GUIDE_GROUPS.values())) - {"rest-reference"}
"""The pages of the documentation for users. Links to other pages become text. The REST API reference is at `/docs`."""

_LIST_TITLES = {"index": "Overview", "rest-reference": "REST API reference", "dashboard": "Dashboard"}
"""Titles in the list of pages that differ from the titles of the pages."""


def guide_file(name: str) -> Path:
    """Return the file of a documentation page: in a wheel, from this package; otherwise, from the checkout."""
    bundled = Path(__file__).parents[1] / "guide"
    directory = bundled if bundled.is_dir() else Path(__file__).parents[4] / "docs"
    return directory / f"{name}.md"


def guide_path(name: str) -> str:
    """Return the path of the dashboard's page for a page of the documentation."""
    return {"errors": "/errors", "index": "/guide", "rest-reference": paths.DOCS}.get(name, f"/guide/{name}")


def without_subtitle(title: str) -> str:
    """Return the part of a title before the colon."""
    return title.partition(":")[0]


class HeadingAnchors:
    """The anchors of a page's headings. `guide.js` uses the same anchors."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, heading: str) -> str:
        """Return the anchor of the next heading: a repeated anchor gets a number."""
        anchor = re.sub(r"[^\w\- ]", "", heading.lower(), flags=re.ASCII).strip().replace(" ", "-")
        number = self._counts[anchor]
        self._counts[anchor] += 1
        return f"{anchor}_{number}" if number else anchor


@cache
def short_title(name: str) -> str:
    """Return a page's title for the list of pages."""
    if name in _LIST_TITLES:
        return _LIST_TITLES[name]
    with guide_file(name).open(encoding="utf-8") as file:
        return without_subtitle(file.readline().removeprefix("# ").strip())


RESULTS_MAX = 20
SEARCHED_WORDS_MAX = 10
_PREFIX_LENGTH_MIN = 3
"""Minimum length of a word that also matches longer words. The last word, which may be incomplete, always does."""

_MARK_BEGIN, _MARK_END = "\x01", "\x02"
_FIND = """
SELECT page, anchor, title, heading, snippet(sections, 6, char(1), char(2), '…', 24)
FROM sections WHERE sections MATCH :query AND (rank_group <= :group_max OR heading = :text COLLATE NOCASE)
ORDER BY heading = :text COLLATE NOCASE AND rank_group <> 1 DESC,
"""
_SEARCH = f"{_FIND} rank_group, bm25(sections, 0, 0, 0, 6.0, 12.0, 1.0, 1.0), rowid LIMIT :results_max"
"""A match in the heading or in the page's title counts more than one in the text."""

_SEARCH_HEADINGS = f"{_FIND} length(heading), rowid LIMIT :results_max"
"""Short headings come first, including those of reference pages."""

_REFERENCE_GROUP, _MINOR_GROUP = 1, 2

_UNSEARCHED_PAGES = frozenset({"benchmarks", "chaos"})
"""Pages that describe tests of Sandbox, not its use."""

_REFERENCE_PAGES = frozenset({"python-client", "configuration"})
"""Pages whose sections rank below those of commands and how-to pages in search results."""

_MINOR_PAGES = frozenset({"index", "gateway", "redaction", "glossary"})
"""Pages whose sections come last in search results, together with the rows of tables."""

_KEYWORDS: Mapping[tuple[str, str], str] = {
    ("troubleshooting", "why-did-my-task-fail"): "failed failure error task",
    ("project", "allow-the-hosts-of-your-package-manager"): "npm pip install package packages",
    ("run", "find-what-a-task-cost"): "cost price money",
    ("operations", "remove-old-tasks"): "clean up full disk space prune",
    ("configuration", "model"): "model",
    ("cli", "sandbox-admin-prune"): "prune clean up full disk space",
}
"""Words that lead to a section before all other results, keyed by page and anchor.

The section of a command also has the command's name.
"""

_COMMAND_HEADING = re.compile(r"sandbox (?:\w+ )?(?P<name>[\w-]+)")
_STOP_WORDS = re.compile(
    r"an?|and|are|can|did|do|does|for|how|i|in|is|it|me|my|of|on|or|the|to|was|what|when|where|which|why|with",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HEADING = re.compile(r"(#{2,4}) (?P<title>.+)")
_CODE_ROW = re.compile(r"\| `(?P<code>\w+)` \| .*?<a id=\"(?P<anchor>[\w-]+)\"></a>")
"""Matches a table row that has its own anchor, such as the row of an error code."""

_LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\([^)]*\)")
_MARKS = re.compile(r"<[^>]*>|\*+(?=\S)|(?<=\S)\*+|`")
_BLOCK_MARKS = re.compile(r"^\s*(?:[-*>#]+|\d+\.) |^\s*\|[\s:|-]+\|\s*$|\|", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, which the search finds as a unit.

    heading: empty for the part before the first heading. is_minor: whether it comes after the other results.
    """

    anchor: str
    title: str
    heading: str
    text: str
    is_minor: bool = False


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A section that was found. excerpt: parts of its text, and whether each part matches."""

    href: str
    title: str
    heading: str
    excerpt: Sequence[tuple[str, bool]]


def search_guide(text: str) -> list[SearchResult]:
    """Return the best sections for these words.

    Sections with all words in their keywords come first, then those with all words in their heading, then those with
    all words, then those with some of them.
    """
    terms = _search_terms(text)
    if not terms:
        return []
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(_index())
        found: dict[tuple[str, str], SearchResult] = {}
        whole_words = " AND ".join(term.removesuffix("*") for term in terms)
        all_terms = " AND ".join(terms)
        searches = (
            (_SEARCH, f"keywords : ({whole_words})", _MINOR_GROUP),
            # The second part of the query marks the words in the excerpt.
            (_SEARCH_HEADINGS, f"(heading : ({all_terms})) AND {all_terms}", _REFERENCE_GROUP),
            (_SEARCH, all_terms, _MINOR_GROUP),
            (_SEARCH, " OR ".join(terms), _MINOR_GROUP),
        )
        for statement, query, group_max in searches:
            values = {"query": query, "group_max": group_max, "text": text.strip(), "results_max": RESULTS_MAX}
            for page, anchor, *parts in connection.execute(statement, values):
                found.setdefault((page, anchor), _make_result(page, anchor, *parts))
    return list(found.values())[:RESULTS_MAX]


def _search_terms(text: str) -> list[str]:
    """Return the words as terms of a full-text query. A word with several parts, such as `vm.memory`, is a phrase.

    NUL characters are replaced, because SQLite ignores the rest of a query after one.
    """
    words = [word.replace('"', "") for word in text.replace("\0", " ").split()]
    words = [word for word in words if any(character.isalnum() for character in word)]
    words = ([word for word in words if not _STOP_WORDS.fullmatch(word)] or words)[:SEARCHED_WORDS_MAX]
    return [
        f'"{word}"*' if at == len(words) - 1 or len(word) >= _PREFIX_LENGTH_MIN else f'"{word}"'
        for at, word in enumerate(words)
    ]


def _make_result(page: str, anchor: str, title: str, heading: str, excerpt: str) -> SearchResult:
    parts = [
        (part, is_match)
        for piece in excerpt.split(_MARK_BEGIN)
        for part, is_match in _split_match(piece, has_match=_MARK_END in piece)
        if part
    ]
    # The text before the first heading has no anchor, and the page's title as its heading.
    href, heading = (f"{guide_path(page)}#{anchor}", heading) if anchor else (guide_path(page), "")
    return SearchResult(href, without_subtitle(title), heading, parts)


def _split_match(piece: str, *, has_match: bool) -> Sequence[tuple[str, bool]]:
    match, _, rest = piece.partition(_MARK_END)
    return [(match, True), (rest, False)] if has_match else [(piece, False)]


@cache
def _index() -> bytes:
    """Return the full-text table as the content of a database. Each search opens its own copy."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(
            "CREATE VIRTUAL TABLE sections USING fts5 (page UNINDEXED, anchor UNINDEXED, rank_group UNINDEXED, "
            "title, heading, keywords, text, tokenize = 'porter unicode61')"
        )
        rows = [
            (
                name,
                section.anchor,
                _MINOR_GROUP if section.is_minor else _REFERENCE_GROUP if name in _REFERENCE_PAGES else 0,
                section.title,
                section.heading or without_subtitle(section.title),
                _keywords(name, section),
                section.text,
            )
            for name in chain.from_iterable(GUIDE_GROUPS.values())
            if name in GUIDE_PAGES - _UNSEARCHED_PAGES
            for section in split_sections(name, guide_file(name).read_text("utf-8"))
        ]
        connection.executemany("INSERT INTO sections VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        connection.commit()
        return connection.serialize()


def _keywords(page: str, section: Section) -> str:
    command = _COMMAND_HEADING.fullmatch(section.heading) if page == "cli" else None
    return " ".join(filter(None, (command and command["name"], _KEYWORDS.get((page, section.anchor)))))


def split_sections(page: str, text: str) -> Iterator[Section]:
    """Split a page at its headings. A row with an anchor, such as that of an error code, is a section too."""
    first, _, body = _COMMENT.sub("", text).partition("\n")
    title, is_minor = first.removeprefix("# "), page in _MINOR_PAGES
    anchors = HeadingAnchors()
    heading, anchor, is_code = "", "", False
    lines: list[str] = []
    for line in body.split("\n"):
        is_code ^= line.lstrip().startswith("```")
        match = None if is_code else _HEADING.fullmatch(line)
        if match:
            yield Section(anchor, title, heading, plain_text(lines), is_minor)
            heading, lines = _without_marks(match["title"]), []
            anchor = anchors.add(heading)
            continue
        lines.append(line)
        if row := _CODE_ROW.match(line):
            yield Section(row["anchor"], title, row["code"], plain_text([line[row.end() :]]), is_minor=True)
    yield Section(anchor, title, heading, plain_text(lines), is_minor)


def plain_text(lines: Sequence[str]) -> str:
    """Return lines of Markdown as plain text on one line."""
    kept = "\n".join(line for line in lines if not line.lstrip().startswith(("```", "![")))
    return " ".join(_without_marks(_BLOCK_MARKS.sub(" ", kept)).split())


def _without_marks(text: str) -> str:
    return _MARKS.sub("", _LINK.sub(r"\g<text>", text))


_COMMENT_OR_IMAGE = re.compile(
    r"<!--.*?-->\n?|<picture>.*?</picture>\n?|^!\[[^\]]*\]\([^)]*\)\n", re.DOTALL | re.MULTILINE
)
"""Matches comments and images, which the dashboard's pages omit."""

_DOCS_SECURITY_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""The policy of the API reference, which allows the style attributes that Swagger UI sets."""


def guide_values(current: str) -> dict[str, Any]:
    """Return the values for the list of pages. current: the name of the page that is shown."""
    groups = [
        (group, [(guide_path(name), short_title(name), name == current) for name in names])
        for group, names in GUIDE_GROUPS.items()
    ]
    return {"groups": groups, "search": "", "search_length_max": SEARCH_CHARACTERS_MAX}


async def show_guide(request: Request, _: AppContext) -> Response:
    """Render a page of the documentation. A script formats its Markdown."""
    name = request.path_params.get("name", "index")
    if name not in GUIDE_PAGES:
        raise HTTPException(404)
    return await fair_client_shares.to_thread(_render_guide, request, name)


def _render_guide(request: Request, name: str) -> Response:
    text = _COMMENT_OR_IMAGE.sub("", guide_file(name).read_text("utf-8"))
    title, _, text = text.removeprefix("# ").partition("\n")
    pages = sorted(GUIDE_PAGES)
    return render_page(request, "guide", title=title, text=text.strip(), pages=pages, **guide_values(name))


async def show_guide_search(request: Request, _: AppContext) -> Response:
    """Render the sections of the documentation that contain the words of `q`."""
    words = request.query_params.get("q", "")[:SEARCH_CHARACTERS_MAX]
    return await fair_client_shares.to_thread(_render_search, request, words)


def _render_search(request: Request, words: str) -> Response:
    values = {**guide_values(""), "search": words, "results": search_guide(words)}
    return render_page(request, "guide_search", **values)


async def show_docs(request: Request, _: AppContext) -> Response:
    """Render the API reference in the site's frame; Swagger UI loads the schema."""
    response = await fair_client_shares.to_thread(_render_docs, request)
    response.headers["content-security-policy"] = _DOCS_SECURITY_POLICY
    return response


def _render_docs(request: Request) -> Response:
    return render_page(request, "docs", **guide_values("rest-reference"))


_ANCHOR = re.compile(r'<a id="(?P<id>[\w-]+)"></a>')
_DOCUMENT_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?:(?P<page>[\w-]+)\.md)?(?P<anchor>#[\w-]+)?\)")


class LinkedText(NamedTuple):
    """A part of a line. href: the address that it links to; empty if it is not a link."""

    text: str
    href: str = ""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A row of the error reference. anchor: its id in the page; cells: the other columns."""

    anchor: str
    code: str
    cells: Sequence[Sequence[LinkedText]]


@dataclass(frozen=True, slots=True)
class ErrorSection:
    """A section of the error reference. depth: 2 or 3, as the level of its heading."""

    title: str
    anchor: str
    depth: int
    notes: Sequence[Sequence[LinkedText]]
    columns: Sequence[str]
    rows: Sequence[ErrorRow]


async def show_errors(request: Request, _: AppContext) -> Response:
    """Render the error reference."""
    return await fair_client_shares.to_thread(_render_errors, request)


def _render_errors(request: Request) -> Response:
    sections = parse_error_reference(guide_file("errors").read_text("utf-8"))
    return render_page(request, "errors", sections=sections, **guide_values("errors"))


def parse_error_reference(text: str) -> list[ErrorSection]:
    """Return the sections of docs/errors.md, with code in backticks."""
    parts = re.split(r"^(##+) (.+)$", text, flags=re.MULTILINE)[1:]
    anchors = HeadingAnchors()
    return [
        _parse_section(marks, title, anchors.add(title), body)
        for marks, title, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def _parse_section(marks: str, title: str, anchor: str, body: str) -> ErrorSection:
    blocks = [block.strip() for block in body.split("\n\n") if block.strip()]
    notes = [_parse_links(block.replace("\n", " ")) for block in blocks if block[0] != "|"]
    lines = [line for block in blocks if block[0] == "|" for line in block.split("\n")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return ErrorSection(title, anchor, len(marks), notes, head, [_parse_row(row) for row in rows])


def _parse_row(row: Sequence[str]) -> ErrorRow:
    code, *cells = row
    anchor = _ANCHOR.match(cells[0])
    return ErrorRow(anchor["id"] if anchor else "", code.strip("`"), [_parse_links(cell) for cell in cells])


def _parse_links(text: str) -> list[LinkedText]:
    """Split text into parts that are links and parts that are not."""
    parts, position = [], 0
    for link in _DOCUMENT_LINK.finditer(text := _ANCHOR.sub("", text)):
        href = f"{guide_path(link['page'])}{link['anchor'] or ''}" if link["page"] else link["anchor"]
        parts += [LinkedText(text[position : link.start()]), LinkedText(link["text"], href)]
        position = link.end()
    return [*parts, LinkedText(text[position:])]
