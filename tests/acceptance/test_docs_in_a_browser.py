"""Somebody opens the documentation of the API in a browser that has no internet, and tries it out there."""

import json
import re
from pathlib import Path

import pytest

from doubles.browser import HEIGHT
from doubles.live_server import says

SCHEMA = Path(__file__).parents[2] / "openapi.json"
SHOWN = """(all) => all.map((one) => [".opblock-summary-method", ".opblock-summary-path"].map(
  (part) => one.querySelector(part).innerText))"""


@pytest.fixture
def docs(world, browser):
    """The address of the page of a server without tasks; in the end nothing was asked of anybody else."""
    place = world(says()).server.said["http"]
    yield f"{place}/docs"
    assert [request.url for request in browser.requests if not request.url.startswith(f"{place}/")] == []
    assert browser.complaints == []


def test_every_operation_is_listed_and_one_is_tried_out_which_asks_nobody_else(docs, browser):
    page = browser.open(docs)
    page.locator(".opblock").first.wait_for()
    schema = json.loads(SCHEMA.read_text())
    shown = page.locator(".opblock").evaluate_all(SHOWN)
    assert {tuple(re.sub(r"[\s\u200b]", "", text) for text in one) for one in shown} == {
        (method.upper(), path) for path, methods in schema["paths"].items() for method in methods
    }
    groups = page.locator(".opblock-tag").evaluate_all("(all) => all.map((one) => one.dataset.tag)")
    assert groups == [tag["name"] for tag in schema["tags"]]
    page.locator(".opblock", has_text="Submit Task").locator(".opblock-summary-control").click()
    page.get_by_text("It is durable once the answer is sent.").wait_for()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": HEIGHT})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        sticking_out = page.locator(".opblock-body *").evaluate_all(
            "(all) => all.filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.className)"
        )
        assert sticking_out == []

    operation = page.locator(".opblock", has_text="List Tasks")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.locator("textarea").fill('{"label.team": "platform"}')
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .highlight-code").first
    assert '"total_count": 0' in answer.inner_text()
    assert browser.requests[-1].url.endswith("&label.team=platform")
    # The twin, so that an empty list of requests to others means something.
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, (error) => error instanceof TypeError)")
    assert refused
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    browser.forgive("Content Security Policy", "127.0.0.1:9")
