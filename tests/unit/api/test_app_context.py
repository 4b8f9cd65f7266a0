"""The hosts from which a server clones depend on whether it requires tokens."""

import asyncio

from doubles.fake_tasks import FakeTasks
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import RequestAdmission
from sandbox.api.settings import ApiSettings

HOSTS = frozenset({"github.com"})


def clone_hosts(*, requires_token: bool = False, **roles: str) -> frozenset[str] | None:
    settings = ApiSettings("0.1.0", frozenset({8122}), agents={}, clone_hosts=HOSTS, requires_token=requires_token)
    admission = RequestAdmission(FakeTokenStore(**roles), settings)
    return AppContext.create(FakeTasks().services, settings, asyncio.Event(), admission).clone_hosts()


def test_clone_hosts_are_restricted_on_a_server_with_tokens():
    assert clone_hosts(olga="operator") == HOSTS
    assert clone_hosts(requires_token=True) == HOSTS
    assert clone_hosts() is None
