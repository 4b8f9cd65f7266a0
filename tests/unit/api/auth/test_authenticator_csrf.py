"""Pages of other sites reach loopback through the browser; they are turned away, programs and own pages are not."""

import pytest

from sandbox.api.auth.authenticator import LOOPBACK_NAMES, check_host

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
def test_programs_and_own_pages_are_let_in(host, origin):
    assert check_host(host, origin, names=NAMES, ports={8121, 8122}) is None


@pytest.mark.parametrize(("origin", "port"), [("http://localhost", 80), ("https://localhost", 443)])
def test_an_origin_without_a_port_has_the_port_of_its_scheme(origin, port):
    assert check_host("localhost:8122", origin, names=NAMES, ports={port}) is None
    assert check_host("localhost:8122", origin, names=NAMES, ports={port - 1, port + 1}) is not None


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "localhost.evil.example:8122", "evil.example:8122", "127.0.0.1.evil.example",
     "localhost@evil.example", "evil.example@localhost", "localhost:port", "localhost:999999", "localhost/x",
     "localhost#", "2130706433", "[::1", "0.0.0.0:8122", "localhost\t"],
)  # fmt: skip
def test_a_rebound_name_is_turned_away(host):
    assert check_host(host, None, names=NAMES, ports={8121, 8122}) is not None


@pytest.mark.parametrize(
    "origin",
    ["null", "", "https://evil.example", "http://localhost:3000", "http://localhost", "http://localhost.evil.example:8122",
     "http://localhost:8122.evil.example", "file://", "http://evil.example@localhost:8122", "chrome-extension://abc",
     "http://localhost:8122/page", "ftp://localhost:8122"],
)  # fmt: skip
def test_a_page_of_another_site_is_turned_away(origin):
    assert check_host("localhost:8122", origin, names=NAMES, ports={8121, 8122}) is not None


def fetched(site, mode, **more):
    """What a browser says of a request."""
    return {"sec-fetch-site": site, "sec-fetch-mode": mode, **more}


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        fetched("cross-site", "no-cors"),
        fetched("same-site", "no-cors"),
        fetched("cross-site", "cors"),
        fetched("cross-site", "navigate", **{"sec-fetch-dest": "iframe"}),
    ],
)
def test_a_foreign_request_reaches_no_route(api, tasks, headers):
    tasks.add("task-001")
    for method, path in (("GET", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-001"), ("GET", "/nowhere")):
        answer = api(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert api.delete("/api/v1/tasks/task-001", headers=fetched("cross-site", "navigate")).status_code == 403
    assert tasks.cancels == []
    assert api.delete("/api/v1/tasks/task-001", headers={"origin": "http://localhost:8122"}).status_code == 200


RUN_OR_SHOWN = (
    "audio", "audioworklet", "dictionary", "embed", "fencedframe", "font", "frame", "iframe", "image", "json",
    "manifest", "object", "paintworklet", "report", "script", "serviceworker", "sharedworker", "style", "track",
    "video", "webidentity", "worker", "xslt", "DOCUMENT", "", "a-word-of-next-year",
)  # fmt: skip
OWN_ADDRESSES = (
    "/api/v1/tasks", "/api/v1/tasks/task-001", "/api/v1/tasks/task-001/logs", "/api/v1/tasks/task-001/artifacts",
    "/api/v1/tasks/task-001/artifacts/a.js", "/api/health", "/metrics", "/openapi.json", "/docs", "/nowhere",
    "/assets", "/docs/../metrics/../nowhere".replace("/..", "/%2e%2e"),
)  # fmt: skip


@pytest.mark.parametrize("destination", RUN_OR_SHOWN)
def test_no_page_not_even_an_own_one_runs_or_embeds_an_answer(api, tasks, destination):
    tasks.add("task-001")
    headers = fetched("same-origin", "no-cors", **{"sec-fetch-dest": destination})
    for path in OWN_ADDRESSES[:-1]:
        answer = api("GET", path, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden"), path
    assert api("GET", OWN_ADDRESSES[-1], headers=headers).status_code in {403, 404}


@pytest.mark.parametrize("destination", ["document", "empty"])
def test_every_answer_can_be_fetched_and_opened_and_runs_nothing(api, tasks, destination):
    tasks.add("task-001")
    for path in OWN_ADDRESSES:
        answer = api("GET", path, headers=fetched("same-origin", "cors", **{"sec-fetch-dest": destination}))
        assert answer.status_code in {200, 404}
        assert ("script-src 'self'" if path == "/docs" else "script-src 'none'") in (
            answer.headers["content-security-policy"]
        )
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("destination", ["script", "style", "image", "document", "empty"])
def test_what_pages_are_made_of_is_loaded(api, destination):
    headers = fetched("same-origin", "no-cors", **{"sec-fetch-dest": destination})
    assert api("GET", "/docs/start.js", headers=headers).status_code == 200
    for worker in ("worker", "sharedworker", "serviceworker", "iframe", "xslt"):
        assert api("GET", "/docs/start.js", headers=headers | {"sec-fetch-dest": worker}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        fetched("none", "navigate"),
        fetched("same-origin", "no-cors"),
        fetched("same-origin", "cors"),
        fetched("cross-site", "navigate", **{"sec-fetch-dest": "document"}),
        fetched("same-site", "cors", origin="http://localhost:8121"),
    ],
    ids=["a program", "an address typed", "an own script", "an own request", "a link", "a page of the other port"],
)
def test_programs_links_and_own_pages_are_answered(api, tasks, headers):
    tasks.add("task-001")
    answer = api("GET", "/api/v1/tasks/task-001", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
