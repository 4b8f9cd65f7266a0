"""A real headless browser: the machine's Chromium, limited to loopback addresses."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Error, sync_playwright

AXE = Path(__file__).parents[2] / ".venv/share/npm-dev/node_modules/axe-core/axe.min.js"
PROGRAMS = ("chromium-headless-shell", "chromium")
HEIGHT = 900
LAYOUTS = (("light", 1280), ("dark", 390))
"""Color scheme and width in CSS pixels. The dashboard's scripts read neither, so tests switch both on an open page."""
TIMEOUT_SECONDS = 60
_AXE_RUN = "axe.run({ resultTypes: ['violations'], preload: false })"
"""Preloading is disabled, because no enabled rule needs it and each run would fetch every style sheet again."""
_LOOPBACK_ONLY = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"


@contextlib.contextmanager
def open_chromium():
    """Yield the machine's Chromium, or skip the test if there is none.

    Playwright runs an event loop in this thread, so `asyncio.run` cannot be used until Chromium is closed.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no {' or '.join(PROGRAMS)} on this machine; script/setup --dev installs it if permitted")
    with tempfile.TemporaryDirectory(prefix="chromium-") as home:
        chromium = Chromium(program, home)
        try:
            yield chromium
        finally:
            chromium.close()


class Chromium:
    """A browser process. Starting it is slow, so tests share the process. It is restarted after a crash."""

    def __init__(self, program, home):
        self._program, self._home = program, home
        self._playwright = self._process = None

    @contextlib.contextmanager
    def browser(self):
        """Yield a browser without state from earlier tests. Close its contexts after the block."""
        if not self._is_alive():
            self.close()
            self._start()
        try:
            yield Browser(self._process)
        finally:
            for context in self._process.contexts:
                with contextlib.suppress(Error):  # the process may have ended
                    context.close()

    def _is_alive(self):
        if self._process is None:
            return False
        with contextlib.suppress(Error):
            self._process.new_browser_cdp_session().detach()
            return True
        return False

    def _start(self):
        self._playwright = sync_playwright().start()
        self._process = self._playwright.chromium.launch(
            executable_path=self._program,
            args=[_LOOPBACK_ONLY],
            chromium_sandbox=os.geteuid() != 0,  # does not work as root
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": self._home},
        )

    def close(self):
        if self._process is not None:
            with contextlib.suppress(Error):
                self._process.close()
        if self._playwright is not None:
            self._playwright.stop()
        self._playwright = self._process = None


class Browser:
    """Collects the requests and errors of all its pages. Each page has its own cookies and storage.

    requests: all Playwright requests. console_errors: console errors and warnings, and exceptions.
    """

    def __init__(self, process):
        self.requests = []
        self.console_errors = []
        self._process = process

    def open(self, url, *, width=1280, scheme="light", status=200, init_script=None, prepare=None):
        """Open a page and load the URL.

        width: the width of the page in CSS pixels. init_script: a script that runs before the scripts of the page.
        prepare: a function that is called with the page before the first request.
        """
        page = self._process.new_page(
            viewport={"width": width, "height": HEIGHT},
            color_scheme=scheme,
            reduced_motion="reduce",  # animations are expensive without a GPU
            bypass_csp=False,
            locale="en-GB",
        )
        if init_script is not None:
            page.add_init_script(init_script)
        if prepare is not None:
            prepare(page)
        page.set_default_timeout(TIMEOUT_SECONDS * 1000)
        page.on("request", self._record_request)
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        page.on("console", self._record_console_message)
        response = page.goto(url)
        assert response.status == status, response.status
        return page

    def requests_to(self, path):
        """Return the requests for this path, in order."""
        return [request for request in self.requests if request.url.partition("?")[0].endswith(path)]

    def ignore_errors(self, *parts):
        """Drop the console errors that contain one of these strings, because the test expects them."""
        self.console_errors[:] = [text for text in self.console_errors if not any(part in text for part in parts)]

    def assert_no_errors(self, *servers):
        """Fail on console errors, and on requests to other servers. servers: the base URLs of the allowed servers."""
        prefixes = tuple(f"{server}/" for server in servers)
        others = [request.url for request in self.requests if not request.url.startswith(prefixes)]
        assert (self.console_errors, others) == ([], [])

    def _record_request(self, request):
        self.requests.append(request)

    def _record_console_message(self, message):
        if message.type in {"error", "warning"}:
            self.console_errors.append(message.text)


def accessibility_violations(page):
    """Return the accessibility violations in all layouts: axe's findings and horizontal overflow.

    Leaves the page in the first layout.
    """
    if not AXE.exists():
        pytest.skip("axe-core is not installed; script/setup --dev fetches it")
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    return [(*layout, *violation) for layout in reversed(LAYOUTS) for violation in _violations(page, *layout)]


def _violations(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": HEIGHT})
    violations = page.evaluate(_AXE_RUN)["violations"]
    found = [
        (violation["id"], [(node["html"][:200], node["failureSummary"]) for node in violation["nodes"][:3]])
        for violation in violations
    ]
    is_wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return [*found, *([("wide",)] if is_wide else [])]
