"""The pages of the documentation, and the search in them."""

import re

import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.dashboard.pages import documentation

LINK = re.compile(r"\]\(([\w./-]+)\.md(?:#([\w-]+))?\)")
DEVELOPER_PAGES = {"../ARCHITECTURE", "../CONTRIBUTING", "../CHANGELOG", "code-tour", "recipes", "releasing"}


def test_guide_has_all_pages_of_the_documentation_for_users(pages):
    configuration = (documentation.guide_file("index").parents[1] / "mkdocs.yml").read_text()
    names = set(re.findall(r"docs/([\w-]+)\.md", configuration)) - DEVELOPER_PAGES - {"rest-reference"}
    assert names == documentation.GUIDE_PAGES
    for name in names:
        page = pages.get(f"/guide/{name}")
        assert page.status_code == 200
        assert "<!--" not in page.text
        linked = {
            link for link, _ in LINK.findall(documentation.guide_file(name).read_text()) if not link.startswith("adr/")
        }
        assert linked - names - DEVELOPER_PAGES - {"rest-reference"} == set(), name
    assert "Sandbox documentation</h1>" in pages.get("/guide").text


@pytest.mark.parametrize("name", ["nobody", "recipes", "..%2F..%2Fpyproject", "errors.md"])
def test_other_files_are_not_pages_of_the_guide(pages, name):
    assert pages.get(f"/guide/{name}").status_code == 404


def test_guide_needs_a_token_on_a_server_with_tokens(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(bob="viewer"))
    assert pages.get("/guide", accept="application/json").status_code == 401
    assert pages.get("/guide", authorization="Bearer bob").status_code == 200


def test_list_of_pages_has_the_order_of_the_documentation(pages):
    """The groups and pages match the documentation site, which also has pages for developers."""
    configuration = (documentation.guide_file("index").parents[1] / "mkdocs.yml").read_text()
    groups = re.split(r"^  - (\w+):$", configuration.partition("\nnav:\n")[2], flags=re.MULTILINE)[1:]
    names = {
        group: tuple(name for name in re.findall(r"docs/([\w-]+)\.md", text) if name not in DEVELOPER_PAGES)
        for group, text in zip(groups[::2], groups[1::2], strict=True)
    }
    assert {group: list(pages) for group, pages in names.items() if pages} == {
        group: list(pages) for group, pages in documentation.GUIDE_GROUPS.items()
    }
    for address, current in (("/guide/limits", "Limits"), ("/errors", "Errors"), ("/guide", "Overview")):
        text = pages.get(address).text
        assert re.findall(r'<a href="([^"]+)" aria-current="page">([^<]+)</a></li>', text) == [(address, current)]
        links = re.findall(r'<li><a href="([^"]+)"[^>]*>', text.partition('aria-label="Documentation"')[2])
        assert links[:4] == ["/guide", "/guide/installation", "/guide/tutorial", "/guide/concepts"]
        assert "/docs" in links


def test_search_page_highlights_results_and_escapes_the_words(pages):
    text = pages.get("/guide/search?q=webhook").text
    assert re.search(r'<a href="/guide/rest#webhooks"><strong>Webhooks</strong>', text)
    assert "<mark>webhooks</mark>" in text
    assert 'value="webhook"' in text
    assert "No results" in pages.get("/guide/search?q=qqqq").text
    text = pages.get("/guide/search?q=%3Cimg%20src%3Dx%3E").text
    assert "<img" not in text
    assert (
        'role="status"'
        not in pages.get("/guide/search").text.partition('id="guide-results"')[2].partition("</main>")[0]
    )


def test_search_needs_a_token_on_a_server_with_tokens(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(bob="viewer"))
    assert pages.get("/guide/search?q=limit", accept="application/json").status_code == 401
    assert pages.get("/guide/search?q=limit", authorization="Bearer bob").status_code == 200
