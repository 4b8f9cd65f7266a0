"""The pages of the guide, of its search, and of the API reference."""

import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.dashboard.guide_pages import GUIDE_GROUPS, GUIDE_PAGES, guide_file, guide_path, short_title
from sandbox.dashboard.guide_search import search_guide
from sandbox.dashboard.templates import CONTENT_SECURITY_POLICY, render_page
from sandbox.model.fixed_limits import SEARCH_CHARACTERS_MAX
from sandbox.primitives import fair_client_shares

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
