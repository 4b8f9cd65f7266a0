"""The API documentation page works without a network."""

import re

import pytest

from doubles.fake_token_store import FakeTokenStore


def test_page_loads_only_assets_of_the_server(api):
    page = api.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    urls = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [url for url in urls if not url.startswith(("/", "data:"))] == []
    for url in urls:
        if url.startswith("/"):
            response = api.get(url)
            assert (response.status_code, len(response.content) > 100) == (200, True), url


def test_page_policy_forbids_foreign_hosts(api):
    for path in ("/docs", "/docs/start.js", "/docs/page.css", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        policy = api.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "://" not in policy


def test_assets_have_their_content_types(api):
    assert api.get("/docs/swagger-ui-bundle.js").headers["content-type"].startswith("text/javascript")
    assert "SwaggerUIBundle" in api.get("/docs/swagger-ui-bundle.js").text
    assert api.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")
    assert api.get("/docs/page.css").headers["content-type"].startswith("text/css")
    assert "/openapi.json" in api.get("/docs/start.js").text


@pytest.mark.parametrize("name", ["redoc.standalone.js", "__init__.py", "..%2fcore.py", "%2e%2e/core.py", ""])
def test_package_files_that_the_page_does_not_use_are_not_served(api, name):
    assert api.get(f"/docs/{name}").status_code == 404


def test_page_indicates_whether_the_server_has_tokens(api, api_with_tokens):
    guarded = api_with_tokens(FakeTokenStore(vera="viewer"))
    assert ' id="page" data-no-tokens>' in api.get("/docs").text
    assert ' id="page">' in guarded.get("/docs", headers={"authorization": "Bearer vera"}).text
