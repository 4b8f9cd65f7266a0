"""The declaration of an attack: what runs inside, and which outcome each tier must show."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from escape.host_watch import WITNESSES

OWN_KERNEL = ("gvisor", "qemu")
"""Tiers whose sandboxes have a kernel of their own, so that what it allows can stay inside."""

CLOCK_SKEW_SECONDS = 1.5
"""A guest reads its clock at boot, in whole seconds."""

DENIED = ("EPERM", "EACCES", "ENOSYS")
"""The answers of a kernel that refuses a call."""


class Outcome(StrEnum):
    """What a row of the table showed. Attacks are declared as REFUSED or INSIDE; UNPROVEN is never written.

    HELD: for rows that are about what the host did, and not about what an attack reports.
    """

    REFUSED = "refused"
    INSIDE = "inside only"
    HELD = "✓"
    ESCAPED = "✗"
    UNPROVEN = "unproven"


@dataclass(frozen=True)
class Attack:
    """One row of the table.

    `attack` and `twin` are Python to run inside. Each reports by calling `through()` when it succeeds, or
    `refused(*words)`. An OSError reports `refused(<name of its errno>)`. Output is never an outcome.

    refused_by: the words that count as a refusal. Everything else that is reported leaves the row unproven.
    inside: the tiers whose own kernel allows the attack. There it must succeed, and the host must not change.
    unchanged: names of the witnesses in host_watch.py that must show no change on the host, whatever the outcome.
    host_paths: paths or names of settings of the battlefield. At least one must exist on the host: without it
        "no such file" proves nothing.
    packet: protocol and setting of the address, port, of a packet that must not arrive outside.
    """

    name: str
    attack: str
    twin: str
    refused_by: tuple[str, ...] = DENIED
    inside: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    host_paths: tuple[str, ...] = ()
    packet: tuple[str, str, int] | None = None

    def __post_init__(self):
        assert set(self.inside) <= set(OWN_KERNEL), f"{self.name}: only {OWN_KERNEL} have a kernel of their own"
        assert self.unchanged or not self.inside, f"{self.name}: name a witness on the host"
        assert set(self.unchanged) <= set(WITNESSES), f"{self.name}: there are no such witnesses"
        assert "ENOENT" not in self.refused_by or self.host_paths, f"{self.name}: what must exist on the host?"
        assert self.refused_by, f"{self.name}: by what may it be refused?"

    def declared(self, tier):
        """The one outcome that this tier must show."""
        return Outcome.INSIDE if tier in self.inside else Outcome.REFUSED


@dataclass(frozen=True)
class Evidence:
    """What the host saw while the attacks ran.

    changes: by witness, what changed · missing: the paths and settings that do not exist on the host
    packets: (protocol, address or setting, port) that arrived outside · samples: begin and end of each look.
    """

    changes: Mapping[str, list[str]]
    missing: frozenset[str] = frozenset()
    packets: frozenset[tuple[str, str, int]] = frozenset()
    samples: tuple[tuple[float, float], ...] = ()

    def covers(self, begin, end):
        """Whether a whole sample was taken while an attack held what it did, by clocks that differ a little."""
        first, last = begin + CLOCK_SKEW_SECONDS, end - CLOCK_SKEW_SECONDS
        return any(first <= sample_begin and sample_end <= last for sample_begin, sample_end in self.samples)
