"""The API documentation page in a browser without internet access."""

import json
import re
from pathlib import Path

import pytest

from doubles.browser import HEIGHT, accessibility_violations
from doubles.live_server import reply

SCHEMA = Path(__file__).parents[2] / "openapi.json"
OPERATIONS = """(all) => all.map((one) => [".opblock-summary-method", ".opblock-summary-path"].map(
  (part) => one.querySelector(part).innerText))"""


@pytest.fixture
def docs(deploy, browser):
    """The API documentation's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    base_url = deploy(reply()).server.ready_message["http"]
    yield f"{base_url}/docs"
    assert [request.url for request in browser.requests if not request.url.startswith(f"{base_url}/")] == []
    assert browser.console_errors == []


def test_docs_page_lists_all_operations_and_runs_one_without_requests_to_other_hosts(docs, browser):
    page = browser.open(docs)
    page.locator(".opblock").first.wait_for()
    schema = json.loads(SCHEMA.read_text())
    operations = page.locator(".opblock").evaluate_all(OPERATIONS)
    assert {tuple(re.sub(r"[\s\u200b]", "", text) for text in labels) for labels in operations} == {
        (method.upper(), path) for path, methods in schema["paths"].items() for method in methods
    }
    groups = page.locator(".opblock-tag").evaluate_all("(all) => all.map((one) => one.dataset.tag)")
    assert groups == [tag["name"] for tag in schema["tags"]]
    page.locator(".opblock", has_text="Submit Task").locator(".opblock-summary-control").click()
    page.get_by_text("The task is durable once the response is sent.").wait_for()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": HEIGHT})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        overflowing = page.locator(".opblock-body *").evaluate_all(
            "(all) => all.filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.className)"
        )
        assert overflowing == []
    assert accessibility_violations(page) == []

    list_tasks = page.locator(".opblock", has_text="List Tasks")
    list_tasks.locator(".opblock-summary-control").click()
    list_tasks.get_by_role("button", name="Try it out").click()
    list_tasks.locator("textarea").fill('{"label.team": "platform"}')
    list_tasks.get_by_role("button", name="Execute").click()
    response = list_tasks.locator(".live-responses-table .highlight-code").first
    assert '"total_count": 0' in response.inner_text()
    assert browser.requests[-1].url.endswith("&label.team=platform")
    assert accessibility_violations(page) == []
    # As a control, a request to another host is blocked and detected.
    is_blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, (error) => error instanceof TypeError)")
    assert is_blocked
    assert any("Content Security Policy" in console_error for console_error in browser.console_errors)
    browser.ignore_errors("Content Security Policy", "127.0.0.1:9")
