"""An API that runs in the test's process and serves tasks from memory."""

from collections.abc import Callable
from typing import Any

import pytest

from doubles.fake_tasks import FakeTasks
from doubles.in_process_api import Api
from sandbox.interfaces.auth import TokenStore


@pytest.fixture
def tasks() -> FakeTasks:
    return FakeTasks()


@pytest.fixture
def api_with_tokens(tasks: FakeTasks) -> Callable[..., Api]:
    """Return a function that creates an API with tokens. It accepts the settings of `ApiSettings`."""

    def make(token_store: TokenStore, **settings: Any) -> Api:
        return Api(tasks, token_store, **settings)

    return make


@pytest.fixture
def api(tasks: FakeTasks) -> Api:
    return Api(tasks)
