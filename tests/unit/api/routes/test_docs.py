"""Somebody reads about the API in a browser, on a machine without a network."""

import re

import pytest


def test_the_page_loads_only_what_the_server_has(api):
    page = api.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [address for address in loaded if not address.startswith(("/", "data:"))] == []
    for address in loaded:
        if address.startswith("/"):
            answer = api.get(address)
            assert (answer.status_code, len(answer.content) > 100) == (200, True), address


def test_the_page_may_talk_to_nobody_else(api):
    for path in ("/docs", "/docs/start.js", "/docs/page.css", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        policy = api.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "://" not in policy


def test_assets_are_of_their_kind(api):
    assert api.get("/docs/swagger-ui-bundle.js").headers["content-type"].startswith("text/javascript")
    assert "SwaggerUIBundle" in api.get("/docs/swagger-ui-bundle.js").text
    assert api.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")
    assert api.get("/docs/page.css").headers["content-type"].startswith("text/css")
    assert "/openapi.json" in api.get("/docs/start.js").text


@pytest.mark.parametrize("name", ["redoc.standalone.js", "__init__.py", "..%2fcore.py", "%2e%2e/core.py", ""])
def test_nothing_else_of_the_package_is_served(api, name):
    assert api.get(f"/docs/{name}").status_code == 404
