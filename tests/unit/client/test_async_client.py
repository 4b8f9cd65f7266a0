"""The client that is awaited can do what the other can."""

import inspect

import pytest

from sandbox.client import AsyncClient, Client


def methods(client: type) -> dict[str, list[str]]:
    """The public methods with their parameters."""
    found = inspect.getmembers(client, lambda member: inspect.isfunction(member) and member.__name__[0] != "_")
    return {name: list(map(str, inspect.signature(method).parameters.values())) for name, method in found}


def test_both_have_the_same_methods_with_the_same_parameters():
    assert len(methods(Client)) > 10
    assert methods(AsyncClient) == methods(Client)


@pytest.mark.parametrize("name", sorted(methods(Client)))
def test_both_say_the_same_of_a_method(name):
    assert inspect.getdoc(getattr(AsyncClient, name)) == inspect.getdoc(getattr(Client, name))
