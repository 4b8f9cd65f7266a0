"""A client that speaks to the app without a socket, and holds every JSON answer against the schema."""

import asyncio
import functools
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import FakeTasks
from sandbox.api.app import create_api_schema_app, create_app
from sandbox.api.auth.authenticator import Authenticator
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import TokenStore

VERSION = "0.1.0"


@functools.cache
def _schema() -> dict[str, Any]:
    """Of every app of this version: what is behind its addresses has no part in it."""
    return create_api_schema_app(VERSION).openapi()


class Api:
    """The API with `tasks` behind it."""

    def __init__(self, tasks: FakeTasks, access: TokenStore | None = None, **settings: Any) -> None:
        self.tasks = tasks
        self.shutting_down = asyncio.Event()
        told = ApiSettings(VERSION, frozenset({8121, 8122}), frozenset({"builds.example.org"}), **settings)
        guard = Authenticator(access or FakeAccess(), told)
        self.app = create_app(tasks, settings=told, shutting_down=self.shutting_down, authenticator=guard)
        self.schema = _schema()

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8122") as client:
                return await client.request(method, path, **options)

        answer = asyncio.run(ask())
        self._check(method, answer)
        return answer

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self("POST", path, **options)

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return self("DELETE", path, **options)

    def _check(self, method: str, answer: httpx.Response) -> None:
        for template, operations in self.schema["paths"].items():
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, answer.url.raw_path.decode().partition("?")[0]) and method.lower() in operations:
                documented = operations[method.lower()]["responses"]
                assert str(answer.status_code) in documented, f"{answer.status_code} of {template} is not documented"
                self._validate(documented[str(answer.status_code)], answer)

    def _validate(self, documented: dict[str, Any], answer: httpx.Response) -> None:
        media_type = answer.headers.get("content-type", "").partition(";")[0]
        kinds = documented.get("content", {})
        assert media_type in kinds or "*/*" in kinds or not (kinds or answer.content), f"{media_type} is not documented"
        headers = documented.get("headers", {})
        assert {name.lower() for name, told in headers.items() if told.get("required")} <= set(answer.headers)
        if media_type not in {"application/json", "application/problem+json"} or media_type not in kinds:
            return
        schema = {**documented["content"][media_type]["schema"], "components": self.schema["components"]}
        Draft202012Validator(schema).validate(answer.json())


@pytest.fixture
def tasks() -> FakeTasks:
    return FakeTasks()


@pytest.fixture
def guarded_api(tasks: FakeTasks) -> Callable[..., Api]:
    """Makes an API with tokens; settings as those of `ApiSettings`."""

    def make(access: TokenStore, **settings: Any) -> Api:
        return Api(tasks, access, **settings)

    return make


@pytest.fixture
def api(tasks: FakeTasks) -> Api:
    return Api(tasks)
