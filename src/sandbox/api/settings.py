"""What the doors are told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the doors are told.

    version: of the server. ports: those that it listens on. host_names: names beside the loopback ones that
    clients may reach it by. needs_token: nobody is let in without one, whether there are any or not.
    requests_per_minute: of one client, 0 for any number. clone_hosts: where repositories may come from as soon as
    there are tokens. priced: whether a model has a price that `budget_usd` can be kept by; None takes every one.
    profiles: asked at each submission for the names of all profiles, with what is in the way of each; None takes every
    name.
    """

    version: str
    ports: frozenset[int]
    host_names: frozenset[str] = frozenset()
    requires_token: bool = False
    requests_per_minute: int = 0
    clone_hosts: frozenset[str] = frozenset()
    priced: Callable[[str], bool] | None = None
    profiles: Callable[[], Mapping[str, str]] | None = None
