"""Isolation tiers of runtimes."""

TIERS = ("namespaces", "gvisor", "vm")
"""Weakest first."""

TIER_DESCRIPTIONS = {
    "namespaces": "namespaces and a filter on system calls, on the host's own kernel",
    "gvisor": "a kernel of its own, which is a program of the host that may use few of the host's system calls",
    "vm": "a virtual machine with a kernel of its own",
}
"""What separates the agent from the host in each tier."""


def is_strong_enough(tier: str, minimum: str) -> bool:
    """Whether a runtime of this tier satisfies a minimum. An empty minimum accepts any; an unknown one accepts none."""
    if not minimum:
        return True
    return tier in TIERS and minimum in TIERS and TIERS.index(tier) >= TIERS.index(minimum)
