"""The verdict on one attack: exactly one outcome, from what it reported inside and from what the host saw."""

from typing import NamedTuple

from escape.attack import Outcome


class Verdict(NamedTuple):
    """An outcome, and the reason for it."""

    outcome: Outcome
    why: str


def judge_attack(attack, tier, result, evidence):
    """attack: its declaration · result: `{attack: report, twin: report}` from inside, see battery.py."""
    escaped = _escape(attack, tier, result, evidence)
    if escaped:
        return Verdict(Outcome.ESCAPED, escaped)
    reason = _doubt(attack, tier, result, evidence)
    if reason:
        return Verdict(Outcome.UNPROVEN, reason)
    return Verdict(attack.declared(tier), str(result["attack"]))


def _escape(attack, tier, result, evidence):
    """Why this is an escape; what the host saw counts, whatever was reported inside."""
    changes = [f"{name}: {change}" for name in attack.unchanged for change in evidence.changes.get(name, ())]
    if changes:
        return f"the host changed: {changes}"
    if attack.packet in evidence.packets:
        return f"a packet arrived outside: {attack.packet}"
    report = result.get("attack", {})
    if report.get("outcome") == "through" and attack.declared(tier) is not Outcome.INSIDE:
        return f"it succeeded: {report}"
    return None


def _doubt(attack, tier, result, evidence):
    """Why nothing is proven."""
    if not {"attack", "twin"} <= result.keys():
        return f"not played: {result}"
    if result["twin"].get("outcome") != "through":
        return f"its twin failed: {result['twin']}"
    return _doubt_of_host(attack, evidence) or _doubt_of_report(attack, tier, result["attack"], evidence)


def _doubt_of_host(attack, evidence):
    unwatched = [name for name in attack.unchanged if name not in evidence.changes]
    if unwatched:
        return f"the host was not watched for: {unwatched}"
    if attack.host_paths and evidence.missing.issuperset(attack.host_paths):
        return f"the host has none of {attack.host_paths}"
    return None


def _doubt_of_report(attack, tier, report, evidence):
    if report.get("outcome") not in {"through", "refused"}:
        return f"it reported no outcome: {report}"
    is_through, declared = report["outcome"] == "through", attack.declared(tier)
    if is_through is not (declared is Outcome.INSIDE):
        return f"declared as {declared.value!r}: {report}"
    if is_through and not evidence.covers(*report.get("held", (0, 0))):
        return f"the host was not looked at while it lasted: {report}"
    words = set(report.get("by", ()))
    if not is_through and not (words and words <= set(attack.refused_by)):
        return f"refused by something that is not declared: {report}"
    return None
