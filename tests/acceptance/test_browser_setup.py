"""Tests of a file share the process of their browsers, and nothing else."""

import http.server
import threading

import pytest
from playwright.sync_api import Error

REMEMBER = "document.cookie = 'who=me'; localStorage.who = 'me'; caches.open('mine')"
REMEMBERED = "(async () => [document.cookie, localStorage.length, await caches.keys()])()"


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>A page</title>")

    def log_message(self, *_):
        pass


@pytest.fixture
def place():
    """The address of a page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_test_sees_nothing_of_the_one_before(chromium, place):
    with chromium.browser() as before:
        left_open = before.open(place)
        left_open.evaluate(REMEMBER)
        left_open.evaluate("window.open('about:blank')")
        left_open.evaluate("setInterval(() => { fetch('/'); console.error('still here'); }, 10)")
        assert left_open.evaluate(REMEMBERED) == ["who=me", 1, ["mine"]]
    assert left_open.is_closed()
    with chromium.browser() as after:
        page = after.open(place)
        assert page.evaluate(REMEMBERED) == ["", 0, []]
        assert page.context.browser.contexts == [page.context]
        assert (len(after.requests), after.complaints) == (1, [])


def test_whoever_comes_after_a_crash_has_a_browser(chromium, place):
    with chromium.browser() as before:
        crashing = before.open(place).context.browser.new_browser_cdp_session()
        with pytest.raises(Error):
            crashing.send("Browser.crash")
    with chromium.browser() as after:
        assert after.open(place).title() == "A page"
