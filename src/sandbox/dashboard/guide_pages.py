"""The pages of the guide: their order, files, addresses, titles and anchors."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from sandbox.api import paths

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
    bundled = Path(__file__).parent / "guide"
    directory = bundled if bundled.is_dir() else Path(__file__).parents[3] / "docs"
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
