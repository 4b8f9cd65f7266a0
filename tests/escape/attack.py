"""One attack, as it is told in a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """`attack` and `twin` are Python to run inside; each prints THROUGH when it has its way."""

    name: str
    attack: str
    twin: str
