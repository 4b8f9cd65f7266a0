"""How strongly runtimes isolate."""

TIERS = ("namespaces", "gvisor", "vm")
"""Weakest first."""

TIER_DESCRIPTIONS = {
    "namespaces": "namespaces and a filter on system calls, on the host's own kernel",
    "gvisor": "a kernel of its own, which is a program of the host that may use few of the host's system calls",
    "vm": "a virtual machine with a kernel of its own",
}
"""What a tier puts between the agent and the host."""


def is_strong_enough(tier: str, minimum: str) -> bool:
    """Whether a runtime of this tier may run what asks for a minimum; empty asks for none, an unknown one never is."""
    if not minimum:
        return True
    return tier in TIERS and minimum in TIERS and TIERS.index(tier) >= TIERS.index(minimum)
