"""Somebody opens the documentation of the API in a browser that has no internet, and tries it out there."""

import json
import re
from pathlib import Path

import pytest

from doubles.live import says

SCHEMA = Path(__file__).parents[2] / "openapi.json"
PARTS = (".opblock-summary-method", ".opblock-summary-path")


@pytest.fixture
def docs(world, browser):
    """The address of the page; in the end nothing was asked of anybody else, and the browser had no complaint."""
    place = world(says()).server.said["http"]
    yield f"{place}/docs"
    assert [request.url for request in browser.requests if not request.url.startswith(f"{place}/")] == []
    assert browser.complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_every_operation_is_listed_in_its_group_and_nothing_sticks_out(docs, browser, width):
    page = browser.open(docs, width=width)
    page.locator(".opblock").first.wait_for()
    schema = json.loads(SCHEMA.read_text())
    shown = {
        tuple(re.sub(r"[\s\u200b]", "", operation.locator(part).inner_text()) for part in PARTS)
        for operation in page.locator(".opblock").all()
    }
    assert shown == {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    groups = [group.get_attribute("data-tag") for group in page.locator(".opblock-tag").all()]
    assert groups == [tag["name"] for tag in schema["tags"]]
    page.locator(".opblock", has_text="Submit Task").locator(".opblock-summary-control").click()
    page.get_by_text("It is durable once the answer is sent.").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = page.locator(".opblock-body *").evaluate_all(
        "(all) => all.filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.className)"
    )
    assert sticking_out == []


def test_a_call_is_tried_out_on_the_page(docs, browser):
    page = browser.open(docs)
    operation = page.locator(".opblock", has_text="List Tasks")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.locator("textarea").fill('{"label.team": "platform"}')
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .highlight-code").first
    assert '"total_count": 0' in answer.inner_text()
    assert browser.requests[-1].url.endswith("&label.team=platform")


def test_a_page_of_the_server_can_send_nothing_elsewhere(docs, browser):
    """The twin of the above, so that an empty list of requests to others means something."""
    page = browser.open(docs)
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, (error) => error instanceof TypeError)")
    assert refused
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
