"""A real browser without a window: the machine's Chromium, whose pages reach loopback and nothing else."""

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
LOOKS = (("light", 1280), ("dark", 390))
"""Scheme and width in CSS pixels; our scripts read neither, so a page can change its look while it is open."""
PATIENCE_SECONDS = 60
_AXE_RUN = "axe.run({ resultTypes: ['violations'], preload: false })"
"""No rule that is on needs what axe would load before: it fetches every style sheet again, for each run."""
_LOOPBACK_ONLY = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"


@contextlib.contextmanager
def open_chromium():
    """The machine's Chromium, for one browser after another; skips the test where the machine has none.

    It has an event loop of its own in this thread, so `asyncio.run` has to wait until it is closed.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no {' or '.join(PROGRAMS)} on this machine; script/setup --dev installs it where it may")
    with tempfile.TemporaryDirectory(prefix="chromium-") as home:
        chromium = Chromium(program, home)
        try:
            yield chromium
        finally:
            chromium.close()


class Chromium:
    """A process that costs more to start than most tests do with it: started once, and anew when it is gone."""

    def __init__(self, program, home):
        self._program, self._home = program, home
        self._playwright = self._process = None

    @contextlib.contextmanager
    def browser(self):
        """A browser that nobody has used before, and of which nothing is left afterwards."""
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
            chromium_sandbox=os.geteuid() != 0,  # which root cannot have
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
    """What its pages asked for and complained of, all together; each has cookies and storage of its own.

    requests: each `playwright` request, answered or not. complaints: errors and warnings of the console, exceptions.
    """

    def __init__(self, process):
        self.requests = []
        self.console_errors = []
        self._process = process

    def open(self, url, *, width=1280, scheme="light", status=200, before=None, prepare=None):
        """A page of this address, loaded; width in CSS pixels, before: a script that runs before all others.

        prepare: called with the page before anything is asked for.
        """
        page = self._process.new_page(
            viewport={"width": width, "height": HEIGHT},
            color_scheme=scheme,
            reduced_motion="reduce",  # a dot that breathes is drawn anew sixty times a second, here without a GPU
            bypass_csp=False,
            locale="en-GB",
        )
        if before is not None:
            page.add_init_script(before)
        if prepare is not None:
            prepare(page)
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        page.on("console", self._listen)
        answer = page.goto(url)
        assert answer.status == status, answer.status
        return page

    def requests_to(self, path):
        """The requests for this path, in their order."""
        return [request for request in self.requests if request.url.partition("?")[0].endswith(path)]

    def ignore_errors(self, *parts):
        """Forget complaints that the test itself has given cause for: those with one of these parts in them."""
        self.console_errors[:] = [text for text in self.console_errors if not any(part in text for part in parts)]

    def _note(self, request):
        self.requests.append(request)

    def _listen(self, message):
        if message.type in {"error", "warning"}:
            self.console_errors.append(message.text)


def shut_out(page):
    """What keeps people from using the page in any look: axe's serious findings, and being wider than its window.

    Leaves it in the first look.
    """
    if not AXE.exists():
        pytest.skip("axe-core is not here; script/setup --dev fetches it")
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    return [(*look, *one) for look in reversed(LOOKS) for one in _shut_out(page, *look)]


def _shut_out(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": HEIGHT})
    found = page.evaluate(_AXE_RUN)["violations"]
    serious = [
        (one["id"], [(node["html"][:200], node["failureSummary"]) for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in {"serious", "critical"}
    ]
    is_wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return [*serious, *([("wide",)] if is_wide else [])]
