"""How strongly runtimes isolate."""

TIERS = ("namespaces", "gvisor", "vm")
"""Weakest first."""


def is_strong_enough(tier: str, minimum: str) -> bool:
    """Whether a runtime of this tier may run what asks for a minimum; empty asks for none, an unknown one never is."""
    if not minimum:
        return True
    return tier in TIERS and minimum in TIERS and TIERS.index(tier) >= TIERS.index(minimum)
