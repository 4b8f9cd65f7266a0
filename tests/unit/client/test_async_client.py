"""The asynchronous client matches the synchronous client."""

import inspect

import pytest

from sandbox.client import AsyncClient, Client


def methods(client: type) -> dict[str, list[str]]:
    """The public methods with their parameters."""
    members = inspect.getmembers(client, lambda member: inspect.isfunction(member) and member.__name__[0] != "_")
    return {name: list(map(str, inspect.signature(method).parameters.values())) for name, method in members}


def test_clients_have_the_same_methods_and_parameters():
    assert len(methods(Client)) > 10
    assert methods(AsyncClient) == methods(Client)


@pytest.mark.parametrize("name", sorted(methods(Client)))
def test_clients_have_the_same_docstrings(name):
    assert inspect.getdoc(getattr(AsyncClient, name)) == inspect.getdoc(getattr(Client, name))
