"""The pages of the documentation, and the search in them."""

import re
from urllib.parse import quote

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


@pytest.mark.parametrize(
    ("words", "best"),
    [
        ("retry failed task", "/guide/manifest#retry-a-failed-task"),
        ("private repository", "/guide/installation#private-repositories"),
        ("why did my task fail", "/guide/troubleshooting#why-did-my-task-fail"),
        ("webhook", "/guide/rest#webhooks"),
        ("cost", "/guide/run#find-what-a-task-cost"),
        ("continue a task", "/guide/rest#continue-a-task"),
        ("clone_failed", "/errors#clone_failed"),
        ("model", "/guide/configuration#model"),
        ("host refused", "/guide/dashboard#allow-a-refused-host"),
        ("own image", "/guide/profiles#import-your-own-container-image"),
        ("rotate a tok", "/guide/access#rotate-a-token"),
        ("Upgrade", "/guide/operations#upgrade"),
        ("upgrade qqqq", "/guide/operations#upgrade"),
        ("logs", "/guide/cli#sandbox-task-logs"),
        ("failed", "/guide/troubleshooting#why-did-my-task-fail"),
        ("npm install", "/guide/project#allow-the-hosts-of-your-package-manager"),
        ("what did it cost", "/guide/run#find-what-a-task-cost"),
        ("clean up disk", "/guide/cli#sandbox-admin-prune"),
        ("how do I apply", "/guide/cli#sandbox-task-apply"),
        ("gpu", "/guide/limits#sandboxes"),
        ("api key", "/guide/configuration#set-the-api-key"),
        ("API key", "/guide/configuration#set-the-api-key"),
        ("where do I set the api key", "/guide/configuration#set-the-api-key"),
        ("subscription", "/guide/configuration#claude-subscriptions-and-other-providers"),
        ("Claude subscription", "/guide/configuration#claude-subscriptions-and-other-providers"),
        ("change the prompt", "/guide/run#change-the-prompt-of-a-task"),
        ("refused host", "/guide/dashboard#allow-a-refused-host"),
        ("private repositories", "/guide/installation#private-repositories"),
        ("select a model", "/guide/configuration#select-a-model"),
        ("interactive session", "/guide/manifest#interactive-sessions"),
        ("limits", "/guide/limits"),
        ("network", "/guide/network"),
        ("Slurm", "/guide/slurm"),
        ("token", "/guide/access#send-a-token"),
        ("timeout", "/errors#timeout"),
        ("allow a host", "/guide/network#allowed-hosts"),
    ],
)
def test_search_finds_the_section_first(words, best):
    assert documentation.search_guide(words)[0].href == best


def test_keywords_belong_to_sections():
    addresses = {
        (page, section.anchor)
        for page in documentation.GUIDE_PAGES
        for section in documentation.split_sections(page, documentation.guide_file(page).read_text("utf-8"))
    }
    assert documentation._KEYWORDS.keys() <= addresses


def test_pages_about_tests_are_not_found():
    words = ("defects that the tests found", "benchmarks", "chaos")
    found = [result.href for each in words for result in documentation.search_guide(each)]
    assert not [href for href in found if href.startswith(("/guide/chaos", "/guide/benchmarks"))]


@pytest.mark.parametrize(
    "words", ["", " ", '"', "-", "* OR", 'NEAR("', "(", "vm.memory:", "\x00", "a\x00b", "'; --", "a " * 200]
)
def test_search_accepts_any_text(pages, words):
    assert isinstance(documentation.search_guide(words), list)
    assert len(documentation.search_guide(words)) <= documentation.RESULTS_MAX
    assert pages.get(f"/guide/search?q={quote(words)}").status_code == 200


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


def test_page_is_split_at_headings_outside_code_and_at_rows_with_anchors():
    text = """# Title

Intro with a [link
over lines](limits.md#a). <!-- hidden -->

## First `part`

## First part

```sh
# no heading
```

## 1. First *part*

- **bold** text

| code | meaning |
| --- | --- |
| `lost` | <a id="lost-1"></a>It is lost. |
"""
    sections = list(documentation.split_sections("errors", text))
    assert [(one.anchor, one.heading, one.text, one.is_minor) for one in sections] == [
        ("", "", "Intro with a link over lines.", False),
        ("first-part", "First part", "", False),
        ("first-part_1", "First part", "no heading", False),
        ("lost-1", "lost", "It is lost.", True),
        ("1-first-part", "1. First part", "bold text code meaning lost It is lost.", False),
    ]
