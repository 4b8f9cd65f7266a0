"""The verdicts on an attack run, keyed by kind and name."""

import re

from escape.attack_run import ATTACKS, HOST, HOST_ADDRESS
from escape.attack_verdict import Outcome, Verdict, judge_attack
from escape.attacks_on_collection import (
    NO_EXECUTION,
    NOT_DELIVERED,
    ORDINARY_FILES,
    OUT_OF_PATCH,
    PRESERVES_FILE_BYTES,
    READS_ONLY_OWN_REPOSITORY,
    RENAMED,
    SKIPPED,
    TRAPS,
)
from escape.host_watch import OBSERVERS

NO_UNEXPECTED_PACKET = "no packet to a destination that is not allowed"
NO_DENIED_REQUEST = "no denied request at the allowed host"
NO_HOST_CHANGE = "no change of host processes, mounts, files, settings, keys, control groups or priorities"
HOST_OBSERVATIONS = (NO_UNEXPECTED_PACKET, NO_DENIED_REQUEST, NO_HOST_CHANGE)
"""Rows whose outcome is observed on the host while all attacks run."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def judge(attack_run):
    """Return `{kind: {name: Verdict}}` for every row of the table; a row that was not run is unproven."""
    return {
        **{kind: judge_attacks(kind, attacks, attack_run) for kind, attacks in ATTACKS.items()},
        "collection": _judge_traps(attack_run),
        "outside": _judge_host_observations(attack_run),
    }


def judge_attacks(kind, attacks, attack_run):
    """Return `{name: Verdict}` for the attacks of one kind."""
    results = attack_run.results.get(kind, {})
    return {
        entry.name: judge_attack(entry, attack_run.runtime, results.get(entry.name, {}), attack_run.evidence)
        for entry in attacks
    }


def _verdict(is_requirement_met, reason):
    return Verdict(Outcome.REQUIREMENT_MET if is_requirement_met else Outcome.ESCAPED, reason)


def _judge_host_observations(attack_run):
    unexpected = attack_run.sent_packets - attack_run.allowed_packets
    hosts = {host.removesuffix(":80").removesuffix(":443") for _, _, host in attack_run.host_requests}
    # The redirect attack starts with an allowed request that names the target.
    denied_requests = [
        line for _, line, _ in attack_run.host_requests if "other.example" in line and "/away/" not in line
    ]
    has_expected_packet = ("tcp", HOST_ADDRESS, 443) in attack_run.sent_packets
    return {
        NO_UNEXPECTED_PACKET: _verdict(not unexpected and has_expected_packet, f"sent: {sorted(unexpected)}"),
        NO_DENIED_REQUEST: _verdict(hosts == {HOST} and not denied_requests, f"requested: {hosts}, {denied_requests}"),
        NO_HOST_CHANGE: judge_watch(attack_run.evidence),
    }


def judge_watch(evidence):
    """Check that every observer has run and that none has found a change."""
    changes = [f"{name}: {change}" for name, found in evidence.changes.items() for change in found]
    unwatched = set(OBSERVERS) - evidence.changes.keys()
    if unwatched and not changes:
        return Verdict(Outcome.UNPROVEN, f"the host was not watched for {sorted(unwatched)}")
    return _verdict(not changes, str(changes))


def _judge_traps(attack_run):
    collected = CollectedOutput(
        attack_run.deployment.artifact("task-1.patch"),
        [
            (entry["name"], entry["path"])
            for entry in attack_run.deployment.http.get("/api/v1/tasks/task-1/artifacts").json()["artifacts"]
        ],
        [event["message"] for event in attack_run.deployment.wire_events() if event["type"] == "error"],
        attack_run.execution_marker_file.exists(),
    )
    return {trap.name: _verdict(collected.passes(trap), f"{trap.requirement}: {trap.checked_text}") for trap in TRAPS}


class CollectedOutput:
    """Collected results of a workspace: the patch, the artifacts (name, path) and error messages.

    has_executed: whether a host tool has executed code from the workspace.
    """

    def __init__(self, patch, artifacts, messages, has_executed):
        self.patch, self.artifacts, self.messages, self.has_executed = patch, artifacts, messages, has_executed
        self.paths = {path for _, path in artifacts}

    def passes(self, trap):
        """Return whether the host handled the trap as required and delivered the ordinary files."""
        is_patched = b"+changed\n" in self.patch and "out/plain.txt" in self.paths
        return is_patched and not self.has_executed and self._is_handled(trap)

    def _is_handled(self, trap):
        return {
            NO_EXECUTION: lambda _: True,  # `passes` checks this requirement for every trap
            READS_ONLY_OWN_REPOSITORY: lambda _: b"root:x:" not in self.patch and b" b/etc/" not in self.patch,
            PRESERVES_FILE_BYTES: self._preserved_bytes,
            ORDINARY_FILES: self._treated_as_ordinary,
            NOT_DELIVERED: self._is_not_delivered,
            SKIPPED: self._is_skipped,
            OUT_OF_PATCH: self._is_left_out_of_the_patch,
            RENAMED: self._has_safe_name,
        }[trap.requirement](trap.checked_text)

    def _preserved_bytes(self, checked_text):
        return b"\r" not in self.patch and f" b/{checked_text}".encode() in self.patch

    def _treated_as_ordinary(self, checked_text):
        return f" b/{checked_text}".encode() in self.patch and b" b/nested/.git/" not in self.patch

    def _is_not_delivered(self, checked_path):
        return not any(path == checked_path or path.startswith(f"{checked_path}/") for path in self.paths)

    def _is_skipped(self, checked_path):
        is_reported = any(checked_path in message for message in self.messages)
        return is_reported and self._is_not_delivered(checked_path) and b"the host's own" not in self.patch

    def _is_left_out_of_the_patch(self, checked_text):
        head, _, rest = self.patch.partition(b"diff --git ")
        return checked_text.encode() in head and checked_text.encode() not in rest

    def _has_safe_name(self, checked_path):
        return checked_path in self.paths and not any(
            _CONTROL_CHARACTERS.search(text) for pair in self.artifacts for text in pair
        )
