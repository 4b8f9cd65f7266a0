"""The page of the error reference, parsed from its Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.dashboard.guide_pages import HeadingAnchors, guide_file, guide_path
from sandbox.dashboard.pages.documentation import guide_values
from sandbox.dashboard.templates import render_page
from sandbox.primitives import fair_client_shares

_ANCHOR = re.compile(r'<a id="(?P<id>[\w-]+)"></a>')
_DOCUMENT_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?:(?P<page>[\w-]+)\.md)?(?P<anchor>#[\w-]+)?\)")


class LinkedText(NamedTuple):
    """A part of a text. href: the address that it links to; empty if it is not a link."""

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
    """Split a text into parts that are links and parts that are not."""
    parts, position = [], 0
    for link in _DOCUMENT_LINK.finditer(text := _ANCHOR.sub("", text)):
        href = f"{guide_path(link['page'])}{link['anchor'] or ''}" if link["page"] else link["anchor"]
        parts += [LinkedText(text[position : link.start()]), LinkedText(link["text"], href)]
        position = link.end()
    return [*parts, LinkedText(text[position:])]
