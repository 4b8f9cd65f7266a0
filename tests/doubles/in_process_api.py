"""A client that calls the app without a socket and validates JSON responses against the schema."""

import asyncio
import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx2
from jsonschema import Draft202012Validator

from doubles.fake_tasks import FakeTasks
from doubles.fake_token_store import FakeTokenStore
from sandbox.agents import registered_agents
from sandbox.api.app import create_api_schema_app, create_app
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import RequestAdmission
from sandbox.api.route_declarations import ITEM_SCHEMA
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import TokenStore

VERSION = "0.1.0"


@functools.cache
def _schema() -> dict[str, Any]:
    """Build the schema once, since it is the same for all apps of this version."""
    return create_api_schema_app(VERSION, registered_agents()).openapi()


class Api:
    """An API that serves `tasks`."""

    def __init__(
        self,
        tasks: FakeTasks,
        token_store: TokenStore | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> None:
        self.tasks = tasks
        self.shutting_down = asyncio.Event()
        api_settings = ApiSettings(
            VERSION,
            frozenset({8121, 8122}),
            frozenset({"builds.example.org"}),
            **({"agents": registered_agents()} | settings),
        )
        admission = RequestAdmission(token_store or FakeTokenStore(), api_settings, monotonic)
        self.app = create_app(AppContext.create(tasks.services, api_settings, self.shutting_down, admission))
        self.schema = _schema()

    def __call__(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async def request() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8122") as client:
                return await client.request(method, path, **options)

        response = asyncio.run(request())
        self._check(method, response)
        return response

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self("POST", path, **options)

    def delete(self, path: str, **options: Any) -> httpx2.Response:
        return self("DELETE", path, **options)

    def _check(self, method: str, response: httpx2.Response) -> None:
        for template, operations in self.schema["paths"].items():
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, response.url.raw_path.decode().partition("?")[0]) and method.lower() in operations:
                documented = operations[method.lower()]["responses"]
                assert str(response.status_code) in documented, (
                    f"{response.status_code} of {template} is not documented"
                )
                self._validate(documented[str(response.status_code)], response)

    def _validate(self, documented: dict[str, Any], response: httpx2.Response) -> None:
        media_type = response.headers.get("content-type", "").partition(";")[0]
        media_types = documented.get("content", {})
        ranges = {media_type, f"{media_type.partition('/')[0]}/*", "*/*"}
        assert ranges & media_types.keys() or not (media_types or response.content), f"{media_type} is not documented"
        headers = documented.get("headers", {})
        assert {name.lower() for name, header in headers.items() if header.get("required")} <= set(response.headers)
        if ITEM_SCHEMA in media_types.get(media_type, {}):
            self._validate_items(media_types[media_type][ITEM_SCHEMA], media_type, response.text)
        if media_type not in {"application/json", "application/problem+json"} or media_type not in media_types:
            return
        schema = {**documented["content"][media_type]["schema"], "components": self.schema["components"]}
        Draft202012Validator(schema).validate(response.json())

    def _validate_items(self, schema: dict[str, Any], media_type: str, text: str) -> None:
        """Validate each event of a stream against the schema of its items."""
        if media_type == "text/event-stream":
            schema = schema["properties"]["data"]["contentSchema"]
        validator = Draft202012Validator({**schema, "components": self.schema["components"]})
        for line in text.split("\n"):
            if (document := line.removeprefix("data: ")).startswith("{"):
                validator.validate(json.loads(document))
