"""Settings of the API."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sandbox.interfaces.agent import Agent


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of the API.

    version: the server's version.
    ports: the ports on which the server listens.
    agents: the agents, keyed by their manifest section.
    host_names: host names for clients, in addition to the loopback names.
    requires_token: require a token even if none exists.
    requests_per_minute: limit per client; 0 means unlimited.
    clone_hosts: hosts from which repositories may be cloned; a server that requires no token ignores them.
    overcommit: the multiples of this machine's capacity that tasks may reserve, keyed by `cpus`, `memory` and `disk`;
    empty if tasks run on other machines.
    list_profiles: returns the names of all profiles, each with the reason why it is unusable (empty if it
    is usable); called for each submission. None accepts every name.
    """

    version: str
    ports: frozenset[int]
    host_names: frozenset[str] = frozenset()
    requires_token: bool = False
    requests_per_minute: int = 0
    clone_hosts: frozenset[str] = frozenset()
    overcommit: Mapping[str, float] = field(default_factory=dict)
    list_profiles: Callable[[], Mapping[str, str]] | None = None
    agents: Mapping[str, Agent] = field(kw_only=True)
