"""Which placements a server uses: each placement is registered here with the settings that select it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from sandbox.bootstrap.local_host import PlacementContext
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.interfaces.placement import Placement

CreatePlacement = Callable[[PlacementContext], Awaitable[Placement]]
"""Creates a placement for a server. Raises OSError, SandboxError."""


class RegisteredPlacement(NamedTuple):
    """A placement that a server can use in addition to the one for its own host.

    is_selected: returns whether the settings select the placement for new attempts.
    load: imports the placement, and returns the function that creates it. A server loads only what the settings select.
    """

    is_selected: Callable[[ServerSettings], bool]
    load: Callable[[], CreatePlacement]


class ChosenPlacements(NamedTuple):
    """All placements of a server except the one for its own host, keyed by the prefix of their host names.

    selected: the name of the placement that runs new attempts; empty for the server's own host.
    """

    by_name: Mapping[str, CreatePlacement] = {}
    selected: str = ""


def _load_cluster() -> CreatePlacement:
    from sandbox.bootstrap.cluster_placement import create_placement

    return create_placement


REGISTERED_PLACEMENTS: Mapping[str, RegisteredPlacement] = {
    "cluster": RegisteredPlacement(lambda settings: settings.cluster.engine != "none", _load_cluster),
}
"""The placements, keyed by the prefix of their host names."""


def choose_placements(
    settings: ServerSettings, registered: Mapping[str, RegisteredPlacement] = REGISTERED_PLACEMENTS
) -> ChosenPlacements:
    """Load the placement that the settings select, if any. Raises ConfigurationError if they select several."""
    names = [name for name, each in registered.items() if each.is_selected(settings)]
    if len(names) > 1:
        raise ConfigurationError(f"Only one of these can run new tasks, but all are configured: {', '.join(names)}.")
    return ChosenPlacements({name: registered[name].load() for name in names}, "".join(names))
