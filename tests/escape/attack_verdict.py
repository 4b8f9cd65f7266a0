"""The verdict on one attack. The outcome follows from the attack's report and the host observations."""

from typing import NamedTuple

from escape.attack import Outcome


class Verdict(NamedTuple):
    """An outcome and the reason for it."""

    outcome: Outcome
    reason: str


def judge_attack(attack, runtime, result, evidence):
    """Return the verdict. attack: its declaration. result: `{attack: report, control: report}`."""
    escaped = _escape_reason(attack, runtime, result, evidence)
    if escaped:
        return Verdict(Outcome.ESCAPED, escaped)
    reason = _unproven_reason(attack, runtime, result, evidence)
    if reason:
        return Verdict(Outcome.UNPROVEN, reason)
    return Verdict(attack.expected_outcome(runtime), str(result["attack"]))


def _escape_reason(attack, runtime, result, evidence):
    """Return why the attack is an escape, or None. Host observations take precedence over the report."""
    changes = [f"{name}: {change}" for name in attack.unchanged_observers for change in evidence.changes.get(name, ())]
    if changes:
        return f"the host changed: {changes}"
    if attack.packet in evidence.packets:
        return f"a packet left the sandbox: {attack.packet}"
    report = result.get("attack", {})
    if report.get("outcome") == "succeeded" and attack.expected_outcome(runtime) is not Outcome.INSIDE:
        return f"it succeeded: {report}"
    return None


def _unproven_reason(attack, runtime, result, evidence):
    """Return why the attack is unproven, or None."""
    if not {"attack", "control"} <= result.keys():
        return f"not run: {result}"
    if result["control"].get("outcome") != "succeeded":
        return f"its control failed: {result['control']}"
    return _unproven_reason_of_watch(attack, evidence) or _unproven_reason_of_report(
        attack, runtime, result["attack"], evidence
    )


def _unproven_reason_of_watch(attack, evidence):
    unwatched = [name for name in attack.unchanged_observers if name not in evidence.changes]
    if unwatched:
        return f"the host was not watched for: {unwatched}"
    if attack.host_paths and evidence.missing_paths.issuperset(attack.host_paths):
        return f"the host has none of {attack.host_paths}"
    return None


def _unproven_reason_of_report(attack, runtime, report, evidence):
    if report.get("outcome") not in {"succeeded", "refused"}:
        return f"the attack reported no outcome: {report}"
    has_succeeded, expected = report["outcome"] == "succeeded", attack.expected_outcome(runtime)
    if has_succeeded is not (expected is Outcome.INSIDE):
        return f"declared as {expected.value!r}: {report}"
    if has_succeeded and not evidence.has_sample_between(*report.get("held", (0, 0))):
        return f"no complete sample of the host was taken while the effects of the attack were kept: {report}"
    words = set(report.get("by", ()))
    if not has_succeeded and not (words and words <= set(attack.denial_words)):
        return f"refused for an undeclared reason: {report}"
    return None
