"""Requests that a browser sends on behalf of another site are denied.

Requests from programs and the server's own pages are allowed.
"""

import pytest

from sandbox.api.authentication import LOOPBACK_NAMES, check_fetch_site, check_host_and_origin

NAMES = LOOPBACK_NAMES | {"builds.example.org"}


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8122", None),
        ("LOCALHOST", None),
        ("127.0.0.1:8122", None),
        ("[::1]:8122", None),
        ("localhost:9000", None),
        ("builds.example.org", None),
        ("localhost:8122", "http://localhost:8122"),
        ("127.0.0.1:8121", "http://localhost:8122"),
        ("localhost:9000", "http://localhost:9000"),
        ("[::1]:8121", "http://[::1]:8122"),
        ("builds.example.org", "https://builds.example.org"),
    ],
)
def test_programs_and_same_origin_pages_are_allowed(host, origin):
    assert check_host_and_origin(host, origin, names=NAMES, ports={8121, 8122}) is None


@pytest.mark.parametrize(("origin", "port"), [("http://localhost", 80), ("https://localhost", 443)])
def test_origin_without_port_has_the_port_of_its_scheme(origin, port):
    assert check_host_and_origin("localhost:8122", origin, names=NAMES, ports={port}) is None
    assert check_host_and_origin("localhost:8122", origin, names=NAMES, ports={port - 1, port + 1}) is not None


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "localhost.evil.example:8122", "evil.example:8122", "127.0.0.1.evil.example",
     "localhost@evil.example", "evil.example@localhost", "localhost:port", "localhost:999999", "localhost/x",
     "localhost#", "2130706433", "[::1", "0.0.0.0:8122", "localhost\t"],
)  # fmt: skip
def test_unknown_or_malformed_host_header_is_denied(host):
    assert check_host_and_origin(host, None, names=NAMES, ports={8121, 8122}) is not None


@pytest.mark.parametrize(
    "origin",
    ["null", "", "https://evil.example", "http://localhost:3000", "http://localhost", "http://localhost.evil.example:8122",
     "http://localhost:8122.evil.example", "file://", "http://evil.example@localhost:8122", "chrome-extension://abc",
     "http://localhost:8122/page", "ftp://localhost:8122"],
)  # fmt: skip
def test_foreign_origin_is_denied(origin):
    assert check_host_and_origin("localhost:8122", origin, names=NAMES, ports={8121, 8122}) is not None


def fetch_metadata(site, mode, **headers):
    """Return the fetch metadata headers of a browser."""
    return {"sec-fetch-site": site, "sec-fetch-mode": mode, **headers}


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        fetch_metadata("cross-site", "no-cors"),
        fetch_metadata("same-site", "no-cors"),
        fetch_metadata("cross-site", "cors"),
        fetch_metadata("cross-site", "navigate", **{"sec-fetch-dest": "iframe"}),
    ],
)
def test_cross_site_request_reaches_no_route(api, tasks, headers):
    tasks.add("task-001")
    for method, path in (("GET", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-001"), ("GET", "/nowhere")):
        response = api(method, path, headers=headers)
        assert (response.status_code, response.json()["error"]) == (403, "forbidden")
    assert api.delete("/api/v1/tasks/task-001", headers=fetch_metadata("cross-site", "navigate")).status_code == 403
    assert tasks.cancels == []
    assert api.delete("/api/v1/tasks/task-001", headers={"origin": "http://localhost:8122"}).status_code == 200


EMBEDDED_DESTINATIONS = (
    "audio", "audioworklet", "dictionary", "embed", "fencedframe", "font", "frame", "iframe", "image", "json",
    "manifest", "object", "paintworklet", "report", "script", "serviceworker", "sharedworker", "style", "track",
    "video", "webidentity", "worker", "xslt", "DOCUMENT", "", "a-future-value",
)  # fmt: skip
SERVER_PATHS = (
    "/api/v1/tasks", "/api/v1/tasks/task-001", "/api/v1/tasks/task-001/logs", "/api/v1/tasks/task-001/artifacts",
    "/api/v1/tasks/task-001/artifacts/a.js", "/api/health", "/metrics", "/openapi.json", "/docs", "/nowhere",
    "/assets", "/docs/../metrics/../nowhere".replace("/..", "/%2e%2e"),
)  # fmt: skip


@pytest.mark.parametrize("destination", EMBEDDED_DESTINATIONS)
def test_pages_cannot_embed_responses(api, tasks, destination):
    tasks.add("task-001")
    headers = fetch_metadata("same-origin", "no-cors", **{"sec-fetch-dest": destination})
    for path in SERVER_PATHS[:-1]:
        response = api("GET", path, headers=headers)
        assert (response.status_code, response.json()["error"]) == (403, "forbidden"), path
    assert api("GET", SERVER_PATHS[-1], headers=headers).status_code in {403, 404}


@pytest.mark.parametrize("destination", ["document", "empty"])
def test_responses_can_be_fetched_but_run_no_foreign_scripts(api, tasks, destination):
    tasks.add("task-001")
    for path in SERVER_PATHS:
        response = api("GET", path, headers=fetch_metadata("same-origin", "cors", **{"sec-fetch-dest": destination}))
        assert response.status_code in {200, 404}
        assert ("script-src 'self'" if path == "/docs" else "script-src 'none'") in (
            response.headers["content-security-policy"]
        )
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("destination", ["script", "style", "image", "worker", "document", "empty"])
def test_page_assets_can_be_embedded(api, destination):
    headers = fetch_metadata("same-origin", "no-cors", **{"sec-fetch-dest": destination})
    assert api("GET", "/docs/start.js", headers=headers).status_code == 200
    for other in ("sharedworker", "serviceworker", "iframe", "xslt"):
        assert api("GET", "/docs/start.js", headers=headers | {"sec-fetch-dest": other}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        fetch_metadata("none", "navigate"),
        fetch_metadata("same-origin", "no-cors"),
        fetch_metadata("same-origin", "cors"),
        fetch_metadata("cross-site", "navigate", **{"sec-fetch-dest": "document"}),
        fetch_metadata("same-site", "cors", origin="http://localhost:8121"),
    ],
    ids=["program", "typed URL", "same-origin script", "same-origin fetch", "link", "page on the other port"],
)
def test_requests_from_programs_and_links_and_same_origin_pages_are_accepted(api, tasks, headers):
    tasks.add("task-001")
    response = api("GET", "/api/v1/tasks/task-001", headers=headers)
    assert response.status_code == 200
    assert response.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("destination", "is_allowed"),
    [(None, True), ("document", True), ("iframe", False), ("empty", False), ("frame", False)],
)
def test_only_top_level_navigation_is_allowed_from_another_site(destination: str | None, is_allowed: bool):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    if destination is not None:
        headers["sec-fetch-dest"] = destination
    assert (check_fetch_site("GET", headers) is None) == is_allowed
    assert check_fetch_site("POST", headers) is not None
    assert check_fetch_site("GET", {**headers, "sec-fetch-mode": "cors"}) is not None
