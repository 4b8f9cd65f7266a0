"""Isolation tiers of runtimes."""

TIERS = ("namespaces", "gvisor", "vm")
"""All tiers, weakest first."""

TIER_DESCRIPTIONS = {
    "namespaces": "namespaces and a system call filter, on the host's kernel",
    "gvisor": "a separate kernel in a host program that may use few system calls",
    "vm": "a virtual machine with a separate kernel",
}
"""What separates the agent from the host in each tier."""


def is_strong_enough(tier: str, minimum: str) -> bool:
    """Return whether a runtime of this tier satisfies a minimum tier.

    An empty minimum accepts every tier; an unknown minimum accepts none.
    """
    if not minimum:
        return True
    return tier in TIERS and minimum in TIERS and TIERS.index(tier) >= TIERS.index(minimum)
