"""The search in the guide."""

from urllib.parse import quote

import pytest

from sandbox.dashboard.pages import documentation


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
