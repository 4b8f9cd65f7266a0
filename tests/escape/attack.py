"""The declaration of an attack: the code to run in a sandbox, and the outcome expected per runtime."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from escape.host_watch import OBSERVERS

OWN_KERNEL = ("gvisor", "qemu")
"""Runtimes whose sandboxes have their own kernel. An attack that such a kernel allows may affect only the sandbox."""

CLOCK_SKEW_SECONDS = 1.5
"""The maximum difference between the clocks of a guest and the host. A guest reads the time in whole seconds."""

PERMISSION_ERRORS = ("EPERM", "EACCES", "ENOSYS")
"""Errors with which a kernel denies a call."""


class Outcome(StrEnum):
    """The outcome of a row in the table of attacks.

    Attacks are declared as REFUSED or INSIDE. REQUIREMENT_MET is used only for rows about the host's behavior. UNPROVEN
    is never written to the table.
    """

    REFUSED = "refused"
    INSIDE = "inside only"
    REQUIREMENT_MET = "✓"
    ESCAPED = "✗"
    UNPROVEN = "unproven"


@dataclass(frozen=True)
class Attack:
    """One attack, and its row in the table of attacks.

    `attack` and `control` are Python code that runs in the sandbox. The code reports its outcome by calling
    `succeeded()` or `refused(*words)`; an OSError counts as `refused(<name of its errno>)`. The printed output never
    determines the outcome.

    denial_words: the words that count as a denial. Any other report leaves the row unproven.
    allowed_inside: the runtimes whose own kernel allows the attack. With these runtimes, the attack must succeed
        without a change on the host.
    unchanged_observers: names of the observers in host_watch.py that must report no change on the host, whatever
        the outcome.
    host_paths: paths, or names of AttackRun settings. At least one of the paths must exist on the host; otherwise
        ENOENT would prove nothing.
    packet: protocol, name of the setting with the address, and port of a packet that must not leave the sandbox.
    """

    name: str
    attack: str
    control: str
    denial_words: tuple[str, ...] = PERMISSION_ERRORS
    allowed_inside: tuple[str, ...] = ()
    unchanged_observers: tuple[str, ...] = ()
    host_paths: tuple[str, ...] = ()
    packet: tuple[str, str, int] | None = None

    def __post_init__(self):
        assert set(self.allowed_inside) <= set(OWN_KERNEL), f"{self.name}: only {OWN_KERNEL} have their own kernel"
        assert self.unchanged_observers or not self.allowed_inside, f"{self.name}: missing observer on the host"
        assert set(self.unchanged_observers) <= set(OBSERVERS), f"{self.name}: unknown observer"
        assert "ENOENT" not in self.denial_words or self.host_paths, f"{self.name}: missing host_paths"
        assert self.denial_words, f"{self.name}: missing denial_words"

    def expected_outcome(self, runtime):
        """Return the outcome expected with this runtime."""
        return Outcome.INSIDE if runtime in self.allowed_inside else Outcome.REFUSED


@dataclass(frozen=True)
class Evidence:
    """Observations made on the host while the attacks ran.

    changes: keyed by observer. missing_paths: the paths that do not exist on the host, or the names of their settings.
    packets: (protocol, address or setting, port) of packets that left the sandbox. samples: the start and end of each
    sample.
    """

    changes: Mapping[str, list[str]]
    missing_paths: frozenset[str] = frozenset()
    packets: frozenset[tuple[str, str, int]] = frozenset()
    samples: tuple[tuple[float, float], ...] = ()

    def has_sample_between(self, begin, end):
        """Return whether a complete sample was taken while the attack's effects were kept. Allow for clock skew."""
        first, last = begin + CLOCK_SKEW_SECONDS, end - CLOCK_SKEW_SECONDS
        return any(first <= sample_begin and sample_end <= last for sample_begin, sample_end in self.samples)
