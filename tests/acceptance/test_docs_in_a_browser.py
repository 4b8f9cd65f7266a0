"""The API documentation page, and the documentation site, in a browser without internet access."""

import functools
import json
import os
import re
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from doubles.browser import HEIGHT, accessibility_violations
from doubles.deployment import reply_turn

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "openapi.json"
SITE_BUILDER = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sandbox-docs" / "venv" / "bin" / "zensical"
)
AUTHORIZATION_SELECTOR = ".auth-wrapper, .authorization__btn, .authorize"
READ_OPERATIONS_SCRIPT = """(all) => all.map((one) => [".opblock-summary-method", ".opblock-summary-path"].map(
  (part) => one.querySelector(part).innerText))"""
FIND_RESULTS_SCRIPT = """() => {
  const results = (root) => [...root.querySelectorAll("*")].flatMap((one) => [
    ...(one.shadowRoot ? results(one.shadowRoot) : []),
    ...(one.matches("a[href*='?h=']") ? [new URL(one.href)] : []),
  ]);
  return results(document).map((url) => url.pathname.slice(1) + url.hash);
}"""
READ_COPY_BUTTON_COLORS_SCRIPT = """(button) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const code = button.closest("pre").querySelector("code");
  canvas.fillStyle = getComputedStyle(code).backgroundColor;
  canvas.fillRect(0, 0, 1, 1);
  const background = [...canvas.getImageData(0, 0, 1, 1).data];
  canvas.fillStyle = getComputedStyle(button).color;
  canvas.fillRect(0, 0, 1, 1);
  return [background, [...canvas.getImageData(0, 0, 1, 1).data]];
}"""


FIND_COVERED_CODE_SCRIPT = """() => [...document.querySelectorAll(".md-code__nav")].filter((nav) => {
  const range = document.createRange();
  range.selectNodeContents(nav.parentElement.querySelector("code"));
  const [button, code] = [nav.getBoundingClientRect(), range.getBoundingClientRect()];
  return button.width > 0 && button.bottom > code.top && button.top < code.bottom && button.left < code.right;
}).map((nav) => nav.parentElement.innerText)"""
FIND_WIDE_TABLES_SCRIPT = """() => [...document.querySelectorAll(".md-typeset table")].filter((table) => {
  const container = table.closest(".md-typeset__scrollwrap");
  return Math.max(table.offsetWidth, table.scrollWidth) > container.clientWidth;
}).map((table) => table.innerText.slice(0, 100))"""
FIND_MARKED_SECTION_SCRIPT = """() => {
  const marked = document.querySelectorAll(".md-sidebar--secondary .md-nav__link--active[href^='#']");
  return [...marked].map((link) => link.getAttribute("href"));
}"""


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without logging requests."""

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """URL of the documentation site, built from this repository."""
    if not SITE_BUILDER.exists():
        pytest.skip("the tools for the documentation site are not installed; script/docs installs them")
    directory = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    subprocess.run([ROOT / "script/docs", directory], env=environment, check=True, capture_output=True, timeout=300)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=directory)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def search(site, browser):
    """Returns the headings that the site's search finds, best match first."""

    def find(words):
        page = browser.open(f"{site}/docs/index.html")
        page.get_by_role("button", name="Search").first.click()
        page.get_by_role("combobox", name="Search").fill(words)
        page.wait_for_function(f"({FIND_RESULTS_SCRIPT})().length > 0")
        return page.evaluate(FIND_RESULTS_SCRIPT)

    return find


def contrast(first, second):
    """Return the contrast between two colors, as WCAG defines it."""
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    parts = [part / 255 for part in color[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.fixture
def docs(deploy, browser):
    """The API documentation's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    base_url = deploy(reply_turn()).server.ready_message["http"]
    yield f"{base_url}/docs"
    browser.assert_no_errors(base_url)


def test_docs_page_lists_all_operations_and_runs_one_without_requests_to_other_hosts(docs, browser):
    page = browser.open(docs)
    page.locator(".opblock").first.wait_for()
    schema = json.loads(SCHEMA.read_text())
    operations = page.locator(".opblock").evaluate_all(READ_OPERATIONS_SCRIPT)
    assert {tuple(re.sub(r"[\s\u200b]", "", text) for text in labels) for labels in operations} == {
        (method.upper(), path) for path, methods in schema["paths"].items() for method in methods
    }
    quick_start = page.locator(".info .description").inner_text()
    assert f"SERVER={docs.removesuffix('/docs')}\n" in quick_start
    assert "Set the address of the server.\n" in quick_start
    assert [word for word in ("localhost:8122", "TOKEN", "Authorization") if word in quick_start] == []
    assert page.locator(AUTHORIZATION_SELECTOR).count() == 0
    assert (
        page.locator(".info .description pre").count() == page.get_by_role("button", name="Copy the code").count() == 4
    )
    groups = page.locator(".opblock-tag").evaluate_all("(all) => all.map((one) => one.dataset.tag)")
    assert groups == [tag["name"] for tag in schema["tags"]]
    page.locator(".opblock", has_text="Submit a task").locator(".opblock-summary-control").click()
    page.get_by_text("The task is durable once the response is sent.").wait_for()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": HEIGHT})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        overflowing = page.locator(".opblock-body *").evaluate_all(
            "(all) => all.filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.className)"
        )
        assert overflowing == []
    assert accessibility_violations(page) == []

    list_tasks = page.locator(".opblock", has_text="List tasks")
    list_tasks.locator(".opblock-summary-control").click()
    list_tasks.get_by_role("button", name="Try it out").click()
    placeholders = {
        name: list_tasks.locator(f"[data-param-name={name}] input").get_attribute("placeholder")
        for name in ("state", "created_after", "q")
    }
    assert placeholders == {"state": "completed,failed", "created_after": "2026-01-29T10:10:15Z", "q": ""}
    assert "string($date-time)" in list_tasks.locator("tr[data-param-name=created_after]").inner_text()
    list_tasks.locator("textarea").fill('{"label.team": "platform"}')
    list_tasks.get_by_role("button", name="Execute").click()
    response = list_tasks.locator(".live-responses-table .highlight-code").first
    assert '"total_count": 0' in response.inner_text()
    sent = browser.requests[-1].url
    assert sent.endswith("&label.team=platform")
    assert "state=" not in sent
    assert accessibility_violations(page) == []
    # As a control, a request to another host is blocked and detected.
    is_blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, (error) => error instanceof TypeError)")
    assert is_blocked
    assert any("Content Security Policy" in console_error for console_error in browser.console_errors)
    browser.ignore_errors("Content Security Policy", "127.0.0.1:9")


@pytest.mark.parametrize(
    ("words", "best"),
    [
        ("retry failed task", "docs/manifest.html#retry-a-failed-task"),
        ("private repository", "docs/installation.html#private-repositories"),
        ("why did my task fail", "docs/troubleshooting.html#why-did-my-task-fail"),
        ("webhook", "docs/rest.html#webhooks"),
        ("cost", "docs/run.html#find-what-a-task-cost"),
        ("resume", "docs/manifest.html#resume-an-interrupted-agent"),
        ("continue a task", "docs/rest.html#continue-a-task"),
        ("clone_failed", "docs/errors.html#clone_failed"),
        ("model", "docs/configuration.html#model"),
        ("token", "docs/cli.html#sandbox-token-create"),
        ("opus", "docs/configuration.html#select-a-model"),
        ("parallel tasks", "docs/operations.html#how-many-tasks-run-at-once"),
        ("how many tasks", "docs/operations.html#how-many-tasks-run-at-once"),
        ("api key", "docs/configuration.html#set-the-api-key"),
        ("subscription", "docs/configuration.html#claude-subscriptions-and-other-providers"),
        ("change the prompt", "docs/run.html#change-the-prompt-of-a-task"),
        ("refused host", "docs/dashboard.html#allow-a-refused-host"),
    ],
)
def test_site_search_finds_the_page_for_users_first(search, words, best):
    assert search(words)[0] == best


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("host refused", "docs/dashboard.html#allow-a-refused-host"),
        ("limit cost", "docs/run.html#find-what-a-task-cost"),
        ("delete a task", "docs/run.html#delete-a-task-release-a-sandbox"),
        ("own image", "docs/profiles.html#import-your-own-container-image"),
        ("resume after failure", "docs/run.html#run-a-task-again-after-a-failure"),
        ("where is the patch", "docs/run.html#apply-the-patch"),
        ("use in CI", "docs/deployment.html#ci-a-task-from-a-pull-request"),
        ("rotate a token", "docs/access.html#rotate-a-token"),
        ("upgrade", "docs/operations.html#upgrade"),
        ("TLS", "docs/access.html#https-and-tls"),
        ("https", "docs/access.html#https-and-tls"),
        ("preserved sandbox", "docs/run.html#look-into-a-preserved-sandbox"),
    ],
)
def test_site_search_answers_the_questions_of_new_users(search, words, page):
    assert page in search(words)[:2]


@pytest.mark.parametrize("words", ["flock", "benchmark"])
def test_site_search_omits_the_changelog_and_decision_and_developer_pages(search, words):
    pages = {result.partition("#")[0] for result in search(words)}
    assert not [page for page in pages if re.search(r"/adr/|CHANGELOG|benchmarks|chaos|code-tour|recipes", page)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_site_copy_buttons_have_sufficient_contrast(site, browser, scheme):
    page = browser.open(f"{site}/docs/run.html", scheme=scheme)
    button = page.locator(".md-code__button").first
    button.wait_for()
    assert contrast(*button.evaluate(READ_COPY_BUTTON_COLORS_SCRIPT)) >= 3


@pytest.mark.parametrize("name", ["index", "cookbook", "installation", "rest", "rest-reference"])
def test_site_copy_buttons_do_not_cover_code_on_a_phone(site, browser, name):
    page = browser.open(f"{site}/docs/{name}.html", width=390)
    page.locator(".md-code__button").first.wait_for()
    assert page.evaluate(FIND_COVERED_CODE_SCRIPT) == []


@pytest.mark.parametrize("name", ["cli", "rest", "rest-reference"])
def test_site_is_accessible(site, browser, name):
    page = browser.open(f"{site}/docs/{name}.html")
    page.locator(".md-code__button").first.wait_for()
    assert "landmark-unique" not in [rule for *_, rule, _ in accessibility_violations(page)]


@pytest.mark.parametrize("width", [390, 1440])
def test_site_tables_fit_on_the_page(site, browser, width):
    page = browser.open(f"{site}/docs/index.html", width=width)
    pages = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    assert {"cli", "configuration", "errors", "limits", "manifest", "python-client", "rest"} <= {*pages}
    wide = {}
    for name in pages:
        page.goto(f"{site}/docs/{name}.html")
        wide[name] = page.evaluate(FIND_WIDE_TABLES_SCRIPT)
    assert {name: tables for name, tables in wide.items() if tables} == {}


def test_narrow_tables_label_their_cells_with_the_column_headings(site, browser):
    page = browser.open(f"{site}/docs/errors.html", width=390)
    cell = page.get_by_role("cell", name="No task has this id.")
    label = "(cell) => getComputedStyle(cell, '::before').content"
    assert cell.evaluate(label).startswith('"meaning')
    page.set_viewport_size({"width": 1440, "height": HEIGHT})
    assert cell.evaluate(label) == "none"


@pytest.mark.parametrize("target", ["rest.html#repeat-a-request-safely", "rest.html#get-the-status"])
def test_table_of_contents_marks_the_linked_section(site, browser, target):
    page = browser.open(f"{site}/docs/{target}", width=1440)
    href = f"#{target.partition('#')[2]}"
    page.wait_for_function(f"(href) => ({FIND_MARKED_SECTION_SCRIPT})().join() === href", arg=href)


def test_a_link_to_an_endpoint_shows_its_title(site, browser):
    page = browser.open(f"{site}/docs/rest-reference.html#delete-apiv1taskstask_id", width=1440)
    page.wait_for_function(f"() => ({FIND_MARKED_SECTION_SCRIPT})().join() === '#delete-taskstask_id'")
    header = page.locator(".md-header").bounding_box()
    title = page.locator("#delete-taskstask_id").bounding_box()
    assert header["y"] + header["height"] <= title["y"] < HEIGHT / 2
