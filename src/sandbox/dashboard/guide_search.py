"""Searches the guide with a full-text table in memory: one row for each section of the Markdown that is shipped."""

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import chain

from sandbox.dashboard.guide_pages import (
    GUIDE_GROUPS,
    GUIDE_PAGES,
    HeadingAnchors,
    guide_file,
    guide_path,
    without_subtitle,
)

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
"""Headings with few other words come first, also those of reference pages."""

_REFERENCE_GROUP, _MINOR_GROUP = 1, 2

_UNSEARCHED_PAGES = frozenset({"benchmarks", "chaos"})
"""Pages that describe tests of Sandbox, not its use."""

_REFERENCE_PAGES = frozenset({"python-client", "configuration"})
"""Pages whose sections come after those of commands and of how-to pages in search results."""

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
