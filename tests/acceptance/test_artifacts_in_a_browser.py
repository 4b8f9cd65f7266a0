"""Artifacts share the dashboard's origin, but no page can load one as a script, style sheet or frame."""

import http.server
import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx2
import pytest

from doubles.deployment import Deployment
from doubles.stored_tasks import StoredTasks

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>parent.ran = true</script>'
    b'<rect id="shape" width="9" height="9"/></svg>'
)
NESTED_SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg"><g id="a0"><path d="M0 0h9"/></g>'
    + b"".join(b'<g id="a%d">' % i + b'<use href="#a%d"/>' % (i - 1) * 10 + b"</g>" for i in range(1, 9))
    + b"</svg>"
)
EXECUTION_REPORTING_SCRIPT = (
    b"globalThis.ran = true; try { postMessage('ran') } catch {} onconnect = (e) => e.ports[0].postMessage('ran');"
)
FILES = {
    "evil.js": EXECUTION_REPORTING_SCRIPT,
    "evil.mjs": EXECUTION_REPORTING_SCRIPT,
    "evil.css": b"#styled { width: 7px !important }",
    "evil.html": b"<script>parent.ran = true</script>",
    "evil.xml": b'<?xml version="1.0"?><x xmlns="http://www.w3.org/1999/xhtml"><script>parent.ran = true</script></x>',
    "evil.svg": SVG,
    "nested.svg": NESTED_SVG,
    "nested.png": NESTED_SVG,
    "evil.json": b'{"loaded": true}',
    "evil.pdf": b"%PDF-1.4 nothing",
    "evil.txt": EXECUTION_REPORTING_SCRIPT,
    "evil": EXECUTION_REPORTING_SCRIPT,
    "pixel.png": PIXEL,
    "report.md": b"# Report\n\nAll **good**.\n",
}
LARGE_IMAGE = PIXEL + bytes(16 * 2**20)
ADDRESSES = [f"/api/v1/tasks/evil/artifacts/{name}" for name in FILES] + [
    "/api/v1/tasks/evil",
    "/api/v1/tasks/evil/logs",
    "/api/v1/tasks/evil/logs?stream=stdout&follow=true",
    "/tasks/evil/proof",
    "/openapi.json",
]
ATTACKS = r"""
async (addresses) => {
  globalThis.ran = false;
  const settled = (element, place = document.body, milliseconds = 6000) => new Promise((done) => {
    element.onload = () => done("load");
    element.onerror = () => done("error");
    setTimeout(() => done("silence"), milliseconds);
    place.append(element);
  });
  const make = (name, fields) => Object.assign(document.createElement(name), fields);
  const started = (worker) => new Promise((done) => {
    (worker.port || worker).onmessage = () => done(true);
    worker.onerror = () => done(false);
    setTimeout(() => done(false), 6000);
  });
  const tries = (address) => ({
    script: async () => (await settled(make("script", { src: address }))) === "load" || ran,
    module: async () => (await settled(make("script", { src: address, type: "module" }))) === "load" || ran,
    import: async () => !!(await import(address)),
    json: async () => !!(await import(address, { with: { type: "json" } })),
    css: async () => !!(await import(address, { with: { type: "css" } })),
    worker: () => started(new Worker(address)),
    module_worker: () => started(new Worker(address, { type: "module" })),
    shared_worker: () => started(new SharedWorker(address)),
    service_worker: async () => !!(await navigator.serviceWorker.register(address)),
    style: async () => {
      const link = make("link", { rel: "stylesheet", href: address });
      return (await settled(link, document.head)) === "load" || styled.offsetWidth === 7;
    },
    imported_style: async () => {
      await settled(make("style", { textContent: `@import url("${address}");` }), document.head);
      return styled.offsetWidth === 7;
    },
    frame: async () => {
      const frame = make("iframe", { src: address });
      await settled(frame);
      return ran || ![null, "about:blank"].includes(frame.contentDocument && frame.contentDocument.URL);
    },
    object: async () => {
      const object = make("object", { data: address });
      await settled(object);
      return ran || ![null, "about:blank"].includes(object.contentDocument && object.contentDocument.URL);
    },
    embed: async () => {
      await settled(make("embed", { src: address }));
      return ran;
    },
    image: async () => (await settled(make("img", { src: address }), document.body, 60000)) === "load",
    use: async () => {
      const place = make("div", { innerHTML: `<svg><use href="${address}#shape"></use></svg>` });
      shapes.append(place);
      await new Promise((done) => setTimeout(done, 1000));
      return place.querySelector("use").getBBox().width > 0;
    },
    font: async () => !!(await new FontFace("evil", `url("${address}")`).load()),
    xslt: async () => {
      const text = `<?xml version="1.0"?><?xml-stylesheet type="text/xsl" href="${address}"?><x/>`;
      const frame = make("iframe", { src: URL.createObjectURL(new Blob([text], { type: "application/xml" })) });
      await settled(frame);
      return ran;
    },
  });
  const loaded = {};
  const attempt_one = async (address, name, attempt) => {
    if (await attempt().catch(() => false)) (loaded[address] ||= []).push(name);
  };
  while (addresses.length) {
    const some = addresses.splice(0, 4);  // more would exceed the connection limit
    await Promise.all(some.flatMap((each) => Object.entries(tries(each)).map((one) => attempt_one(each, ...one))));
  }
  return loaded;
}
"""
PAGE = '<!doctype html><body><div id="styled" style="width: 5px">x</div><div id="shapes"></div></body>'


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A server with a finished task whose artifacts are FILES and LARGE_IMAGE."""
    deployment = Deployment(tmp_path_factory.mktemp("artifacts"))
    tasks = StoredTasks(deployment.data_dir)
    tasks.current_time = datetime.now(UTC) - timedelta(hours=1)
    tasks.add_completed_task("evil", artifacts=[*FILES.items(), ("large.png", LARGE_IMAGE)])
    tasks.index()
    deployment.model_url = "http://127.0.0.1:9"
    deployment.start_server()
    yield deployment
    deployment.close()


@contextmanager
def proxy_without_fetch_metadata(base_url):
    """Yield a proxy that drops fetch metadata. (Browsers do not send it over plain HTTP to another machine.)"""

    class ProxyHandler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/attack":
                self.respond(200, {"Content-Type": "text/html"}, PAGE.encode())
                return
            with httpx2.stream("GET", base_url + self.path) as response:
                headers = {name: value for name, value in response.headers.items() if name not in DROPPED_HEADERS}
                body = b"" if "follow" in self.path else response.read()
                self.respond(response.status_code, headers, body)

        def respond(self, status, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ProxyHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


DROPPED_HEADERS = {"content-length", "transfer-encoding", "connection", "date"}


def open_attack_page(browser, origin):
    """Open a page on this origin without a content security policy."""
    return browser.open(
        f"{origin}/attack",
        prepare=lambda page: page.route(
            f"{origin}/attack", lambda route: route.fulfill(content_type="text/html", body=PAGE)
        ),
    )


def test_same_origin_page_cannot_load_responses_as_code(deployment, browser):
    origin = deployment.server.ready_message["http"]
    page = open_attack_page(browser, origin)
    assert page.evaluate(ATTACKS, ADDRESSES) == {}
    # Control: the dashboard's own assets load, which shows that the test detects a successful load.
    loaded = page.evaluate(ATTACKS, ["/assets/untrusted_text.js", "/assets/dashboard.css", "/assets/icon.svg"])
    assert {"module", "import"} <= set(loaded["/assets/untrusted_text.js"])
    assert set(loaded["/assets/untrusted_text.js"]).isdisjoint(
        {"worker", "module_worker", "shared_worker", "service_worker"}
    )
    assert {"style", "css"} <= set(loaded["/assets/dashboard.css"])
    assert loaded["/assets/icon.svg"] == ["image"]


def test_browsers_without_fetch_metadata_do_not_load_responses_as_code(deployment, browser):
    with proxy_without_fetch_metadata(deployment.server.ready_message["http"]) as origin:
        page = browser.open(f"{origin}/attack")
        loaded = page.evaluate(ATTACKS, ADDRESSES)
    # Images and imported JSON are not executed; they are data, like a fetched response.
    assert loaded == {
        "/api/v1/tasks/evil/artifacts/pixel.png": ["image"],
        "/api/v1/tasks/evil": ["json"],
        "/openapi.json": ["json"],
    }


def test_artifacts_are_fetched_and_downloaded(deployment, browser, tmp_path):
    origin = deployment.server.ready_message["http"]
    page = open_attack_page(browser, origin)
    for name, content in FILES.items():
        address = f"/api/v1/tasks/evil/artifacts/{name}"
        read = "async (address) => [...new Uint8Array(await (await fetch(address)).arrayBuffer())]"
        assert bytes(page.evaluate(read, address)) == content
        for link in (f"<a id=link href='{address}'>get</a>", f"<a id=link download href='{address}'>get</a>"):
            page.locator("#shapes").evaluate("(place, html) => { place.innerHTML = html; }", link)
            with page.expect_download() as started:
                page.locator("#link").click()
            assert started.value.suggested_filename == name
            started.value.save_as(tmp_path / "got")
            assert (tmp_path / "got").read_bytes() == content


def test_dashboard_previews_text_and_markdown_and_images(deployment, browser):
    page = browser.open(f"{deployment.server.ready_message['http']}/tasks/evil")
    page.get_by_role("tab", name="Artifacts").click()
    for name in FILES:
        page.get_by_role("button", name=name, exact=True).click()
    page.locator(".preview strong", has_text="good").wait_for()
    picture = page.locator(".preview img[alt='pixel.png']")
    picture.wait_for()
    assert picture.evaluate("async (picture) => { await picture.decode(); return picture.naturalWidth; }") > 0
    previews = page.locator(".preview pre").all_inner_texts()
    shown_as_text = ("evil.js", "evil.html", "evil.css", "evil.svg", "nested.svg")
    assert {FILES[name].decode().strip() for name in shown_as_text} <= {text.strip() for text in previews}
    assert not page.evaluate("'ran' in window")
    assert browser.console_errors == []


def test_large_image_is_not_previewed(deployment, browser):
    page = browser.open(f"{deployment.server.ready_message['http']}/tasks/evil")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("button", name="large.png", exact=True).click()
    page.locator(".preview", has_text="This image is larger than 16.0 MiB; download it to view it.").wait_for()
    assert page.locator(".preview img").count() == 0
    assert not any(request.url.endswith("large.png") for request in browser.requests)


def test_download_has_the_listed_bytes_and_a_safe_content_type(deployment):
    artifacts = deployment.http.get("/api/v1/tasks/evil/artifacts").json()["artifacts"]
    for artifact in artifacts:
        response = deployment.http.get(artifact["download_url"])
        assert response.content == FILES.get(artifact["name"], LARGE_IMAGE)
        assert response.headers["content-type"] in {
            "text/plain; charset=utf-8",
            "image/png",
            "application/octet-stream",
        }
    assert json.loads(deployment.http.get("/api/v1/tasks/evil/artifacts/evil.json").text) == {"loaded": True}
