"""Browsers in a test module share one process but no state."""

import http.server
import threading

import pytest
from playwright.sync_api import Error

STORE_DATA_SCRIPT = "document.cookie = 'who=me'; localStorage.who = 'me'; caches.open('mine')"
READ_STORED_DATA_SCRIPT = "(async () => [document.cookie, localStorage.length, await caches.keys()])()"


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>A page</title>")

    def log_message(self, *_):
        pass


@pytest.fixture
def page_url():
    """The URL of a test page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_browsers_share_no_state_between_tests(chromium, page_url):
    with chromium.browser() as before:
        left_open = before.open(page_url)
        left_open.evaluate(STORE_DATA_SCRIPT)
        left_open.evaluate("window.open('about:blank')")
        left_open.evaluate("setInterval(() => { fetch('/'); console.error('still here'); }, 10)")
        assert left_open.evaluate(READ_STORED_DATA_SCRIPT) == ["who=me", 1, ["mine"]]
    assert left_open.is_closed()
    with chromium.browser() as after:
        page = after.open(page_url)
        assert page.evaluate(READ_STORED_DATA_SCRIPT) == ["", 0, []]
        assert page.context.browser.contexts == [page.context]
        assert (len(after.requests), after.console_errors) == (1, [])


def test_browser_restarts_after_a_crash(chromium, page_url):
    with chromium.browser() as before:
        crashing = before.open(page_url).context.browser.new_browser_cdp_session()
        with pytest.raises(Error):
            crashing.send("Browser.crash")
    with chromium.browser() as after:
        assert after.open(page_url).title() == "A page"
