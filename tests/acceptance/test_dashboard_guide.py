"""The documentation in the dashboard, in a real browser: its list of pages, contents, search and copy buttons."""

import re

import pytest

from doubles.browser import HEIGHT, accessibility_violations
from doubles.deployment import Deployment, wait_until
from sandbox.dashboard.pages.documentation import GUIDE_PAGES, guide_file, guide_path, split_sections

COUNT_COVERED_CODE_SCRIPT = """() => [...document.querySelectorAll(".guide-code")].filter((frame) => {
  const range = document.createRange();
  range.selectNodeContents(frame.querySelector("code"));
  const [button, code] = [frame.querySelector("button").getBoundingClientRect(), range.getBoundingClientRect()];
  return button.bottom > code.top && button.left < code.right;
}).length"""
READ_IDS_AND_LINKS_SCRIPT = """() => {
  const main = document.querySelector(".guide-main");
  const all = (selector, name) => [...main.querySelectorAll(selector)].map((each) => each.getAttribute(name));
  return [all("[id]", "id"), all("a[href]", "href")];
}"""
READ_CURRENT_SECTION_SCRIPT = "document.querySelector('#guide-contents [aria-current]')?.textContent"


@pytest.fixture(scope="module")
def guide_server(tmp_path_factory):
    """A server without tasks."""
    deployment = Deployment(tmp_path_factory.mktemp("guide"))
    try:
        deployment.model_url = "http://127.0.0.1:9"
        deployment.start_server()
        yield deployment
    finally:
        deployment.close()


@pytest.fixture
def base_url(guide_server, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    address = guide_server.server.ready_message["http"]
    yield address
    browser.assert_no_errors(address)


def open_page(browser, url, **options):
    page = browser.open(url, **options)
    page.locator("#guide .said").wait_for()
    return page


def top_of(page, name):
    return page.get_by_role("heading", name=name, exact=True).bounding_box()["y"]


def test_pages_are_formatted_and_link_to_each_other(base_url, browser):
    page = browser.open(base_url, width=390)
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Docs").click()
    page.get_by_role("heading", name="Sandbox documentation").wait_for()
    page.locator(".guide").get_by_role("link", name="limits", exact=True).click()
    page.wait_for_url("**/guide/limits")
    page.locator(".guide table").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert accessibility_violations(page) == []
    page.goto(f"{base_url}/guide/run#commit-to-a-branch")
    wait_until(lambda: 0 <= top_of(page, "Commit to a branch") < 400, 30, "the section")
    page.goto(f"{base_url}/guide")
    # Pages for developers are not part of the dashboard.
    page.locator(".guide", has_text="Contribute").wait_for()
    links = page.locator(".guide a").evaluate_all("(links) => links.map((link) => link.getAttribute('href'))")
    assert all(link.startswith(("/guide/", "/errors", "/docs", "http", "#")) for link in links), links


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_list_of_pages_and_contents_are_visible_if_there_is_space(base_url, browser, width):
    page = open_page(browser, f"{base_url}/guide/manifest", width=width)
    pages = page.get_by_role("navigation", name="Documentation")
    contents = page.get_by_role("navigation", name="On this page")
    assert pages.is_visible() == (width > 900)
    assert contents.is_visible() == (width > 1200)
    if width <= 900:
        page.locator("#guide-pages > summary").click()
    if width <= 1200:
        page.locator("#guide-contents > summary").click()
    contents.get_by_role("link", name="Retry a failed task").click()
    wait_until(lambda: 0 <= top_of(page, "Retry a failed task") < 100, 30, "the section")
    assert page.url.endswith("/guide/manifest#retry-a-failed-task")
    wait_until(lambda: page.evaluate(READ_CURRENT_SECTION_SCRIPT) == "Retry a failed task", 30, "the mark")
    assert pages.locator("[aria-current=page]").inner_text() == "Manifest"
    pages.get_by_role("link", name="Troubleshooting").click()
    page.wait_for_url("**/guide/troubleshooting")


@pytest.mark.parametrize("path", ["/guide", "/errors", "/docs", "/guide/benchmarks"])
def test_list_of_pages_shows_the_current_one_without_scrolling_the_window(base_url, browser, path):
    page = browser.open(f"{base_url}{path}", width=1440)
    current = page.locator("#guide-pages [aria-current=page]")
    wait_until(lambda: 0 < current.bounding_box()["y"] <= HEIGHT - current.bounding_box()["height"], 30, "the link")
    page.locator("#guide-contents a").first.wait_for()
    assert page.evaluate("window.scrollY") == 0


def test_search_shows_results_while_the_user_types(base_url, browser):
    page = open_page(browser, f"{base_url}/guide/limits")
    page.keyboard.press("/")
    page.keyboard.type("retry fail")
    result = page.locator("#guide-found a").first
    result.wait_for()
    assert result.inner_text().startswith("Retry a failed task")
    assert accessibility_violations(page) == []
    page.get_by_role("searchbox").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert result.is_hidden()
    page.get_by_role("searchbox").fill("retry failed")
    page.locator("#guide-found a").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/guide/manifest#retry-a-failed-task")
    wait_until(lambda: 0 <= top_of(page, "Retry a failed task") < 100, 30, "the section")
    # Choosing a result on the same page closes the list of results.
    page.get_by_role("searchbox").fill("attempts")
    page.locator("#guide-found").get_by_role("link", name="Attempts Manifest").click()
    wait_until(lambda: 0 <= top_of(page, "Attempts") < 100, 30, "the section")
    assert page.locator("#guide-found").is_hidden()
    page.get_by_role("searchbox").fill("webhook")
    page.keyboard.press("Enter")
    page.wait_for_url("**/guide/search?q=webhook")
    page.get_by_role("heading", name="Search results").wait_for()
    assert accessibility_violations(page) == []


def test_every_section_that_the_search_finds_exists(base_url, browser):
    page = browser.open(f"{base_url}/guide")
    missing = {}
    for name in sorted(GUIDE_PAGES):
        page.goto(f"{base_url}{guide_path(name)}")
        page.locator("#guide .said, .codes").first.wait_for()
        anchors = [section.anchor for section in split_sections(name, guide_file(name).read_text()) if section.anchor]
        missing[name] = page.evaluate("(all) => all.filter((one) => !document.getElementById(one))", anchors)
    assert {name: anchors for name, anchors in missing.items() if anchors} == {}


def test_every_link_leads_to_a_place_that_exists(base_url, browser):
    page = browser.open(f"{base_url}/guide")
    links, places = set(), set()
    for name in sorted(GUIDE_PAGES):
        path = guide_path(name)
        page.goto(f"{base_url}{path}")
        page.locator("#guide .said, .codes").first.wait_for()
        ids, hrefs = page.evaluate(READ_IDS_AND_LINKS_SCRIPT)
        places.update([path, *(f"{path}#{each}" for each in ids)])
        links.update(path + href if href.startswith("#") else href for href in hrefs)
        assert len(set(ids)) == len(ids), path
        anchors = set(re.findall(r'<a id="([\w-]+)"></a>', guide_file(name).read_text()))
        assert anchors <= set(ids), path
    assert "/guide/rest#get-taskstask_id" in places
    local = {link for link in links if link.startswith("/") and link.partition("#")[0] != "/docs"}
    assert local - places == set()


def test_link_to_an_inline_anchor_shows_its_row(base_url, browser):
    page = open_page(browser, f"{base_url}/guide/rest#post-adminprune", width=390)
    row = page.get_by_role("row", name="Remove finished tasks and their data")
    wait_until(lambda: 0 <= row.bounding_box()["y"] < HEIGHT - 50, 30, "the row in view")
    assert "<a id" not in page.locator("#guide").inner_text()


@pytest.mark.parametrize("width", [1440, 390])
def test_link_to_the_reference_opens_the_operation_or_the_object(base_url, browser, width):
    page = browser.open(f"{base_url}/docs#post-apiv1taskstask_idrerun", width=width)
    operation = page.locator(".opblock.is-open", has_text="Submit a new task with the manifest of this task")
    wait_until(lambda: operation.count() and 0 <= operation.bounding_box()["y"] < 200, 30, "the operation")
    page.goto(f"{base_url}/guide")
    page.goto(f"{base_url}/docs#remedy")
    title = page.locator(".models .json-schema-2020-12__title", has_text=re.compile("^Remedy$"))
    wait_until(lambda: title.count() and 0 <= title.bounding_box()["y"] < HEIGHT - 50, 30, "the object")


def test_code_has_copy_buttons_and_the_address_of_this_server(base_url, browser):
    page = open_page(browser, f"{base_url}/guide/rest", width=390)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    assert page.evaluate(COUNT_COVERED_CODE_SCRIPT) == 0
    code = page.locator(".guide pre").first
    page.locator(".guide-code").first.get_by_role("button", name="Copy the code").click()
    wait_until(lambda: page.evaluate("window.copied") is not None, 10, "the copied text")
    assert page.evaluate("window.copied") == code.inner_text()
    assert f"{base_url}/api/v1/tasks" in code.inner_text()
    assert page.get_by_text("localhost:8122").count() == 0
    page.locator(".guide pre .s-s").first.wait_for()
    assert accessibility_violations(page) == [], "with syntax colors"
    page.goto(f"{base_url}/guide/metrics")
    page.locator("#guide .said").wait_for()
    assert page.get_by_text(f'targets: ["{base_url.partition("//")[2]}"]').count() == 1
    # The default value of an option is not replaced by the address of this server.
    page.goto(f"{base_url}/guide/cli")
    page.locator("#guide .said").wait_for()
    assert page.get_by_text("the default is http://localhost:8122").count() == 1
    assert page.get_by_text("# back to http://localhost:8122").count() == 1
