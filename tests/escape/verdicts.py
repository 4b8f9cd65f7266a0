"""The verdicts on all that was played on a battlefield, by kind and name."""

import re

from escape.attack_runner import ATTACKS, HOST, HOST_ADDRESS
from escape.attacks_on_collection import (
    KEEPS_BYTES,
    LEFT_OUT,
    NOT_DELIVERED,
    ORDINARY,
    OUT_OF_PATCH,
    READS_ITS_OWN,
    RUNS_NOTHING,
    SHOWN,
    TRAPS,
)
from escape.host_watch import WITNESSES
from escape.verdict import Outcome, Verdict, judge_attack

ON_THE_WIRE = "a packet to anything that is not allowed"
ASKED = "a request at the allowed host that was to be refused"
CHANGED = "a change of the host's processes, mounts, files, settings, keys, control groups or priorities"
SEEN = (ON_THE_WIRE, ASKED, CHANGED)
"""What shows only from outside: over all attacks together."""

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def judge(field):
    """`{kind: {name: Verdict}}` of every row of the table; a row that was not played is unproven."""
    return {
        **{kind: judge_attacks(kind, attacks, field) for kind, attacks in ATTACKS.items()},
        "collection": _judge_traps(field),
        "outside": _judge_from_outside(field),
    }


def judge_attacks(kind, attacks, field):
    """`{name: Verdict}`."""
    results = field.results.get(kind, {})
    return {one.name: judge_attack(one, field.tier, results.get(one.name, {}), field.evidence) for one in attacks}


def _held(is_held, why):
    return Verdict(Outcome.HELD if is_held else Outcome.ESCAPED, why)


def _judge_from_outside(field):
    strange = field.sent - field.allowed
    hosts = {host.removesuffix(":80").removesuffix(":443") for _, _, host in field.asked}
    # Being sent elsewhere begins with a good request, and names where to.
    refused = [line for _, line, _ in field.asked if "other.example" in line and "/away/" not in line]
    is_wire_seen = ("tcp", HOST_ADDRESS, 443) in field.sent
    return {
        ON_THE_WIRE: _held(not strange and is_wire_seen, f"sent: {sorted(strange)}"),
        ASKED: _held(hosts == {HOST} and not refused, f"asked: {hosts}, {refused}"),
        CHANGED: judge_watch(field.evidence),
    }


def judge_watch(evidence):
    """The host as a whole: every witness must have looked, and none have seen a change."""
    changes = [f"{name}: {change}" for name, found in evidence.changes.items() for change in found]
    unwatched = set(WITNESSES) - evidence.changes.keys()
    if unwatched and not changes:
        return Verdict(Outcome.UNPROVEN, f"the host was not watched for {sorted(unwatched)}")
    return _held(not changes, str(changes))


def _judge_traps(field):
    found = Collected(
        field.world.artifact("task-1.patch"),
        [
            (one["name"], one["path"])
            for one in field.world.http.get("/api/v1/tasks/task-1/artifacts").json()["artifacts"]
        ],
        [frame["message"] for frame in field.world.frames() if frame["type"] == "error"],
        field.mark.exists(),
    )
    return {trap.name: _held(found.holds(trap), f"{trap.must}: {trap.sign}") for trap in TRAPS}


class Collected:
    """What the host made of a workspace: patch, artifacts (name, path), messages, and whether the mark was left."""

    def __init__(self, patch, artifacts, told, is_marked):
        self.patch, self.artifacts, self.told, self.is_marked = patch, artifacts, told, is_marked
        self.paths = {path for _, path in artifacts}

    def holds(self, trap):
        """The host did what it must, and what is no trap beside it was delivered."""
        is_patched = b"+changed\n" in self.patch and "out/plain.txt" in self.paths
        return is_patched and not self.is_marked and self._did(trap)

    def _did(self, trap):
        return {
            RUNS_NOTHING: lambda _: True,  # only the mark tells, and that is asked for every trap
            READS_ITS_OWN: lambda _: b"root:x:" not in self.patch and b" b/etc/" not in self.patch,
            KEEPS_BYTES: self._kept_bytes,
            ORDINARY: self._took_for_ordinary,
            NOT_DELIVERED: self._did_not_deliver,
            LEFT_OUT: self._left_out,
            OUT_OF_PATCH: self._left_out_of_the_patch,
            SHOWN: self._shown,
        }[trap.must](trap.sign)

    def _kept_bytes(self, sign):
        return b"\r" not in self.patch and f" b/{sign}".encode() in self.patch

    def _took_for_ordinary(self, sign):
        return f" b/{sign}".encode() in self.patch and b" b/nested/.git/" not in self.patch

    def _did_not_deliver(self, sign):
        return not any(path == sign or path.startswith(f"{sign}/") for path in self.paths)

    def _left_out(self, sign):
        is_told = any(sign in message for message in self.told)
        return is_told and self._did_not_deliver(sign) and b"the host's own" not in self.patch

    def _left_out_of_the_patch(self, sign):
        head, _, rest = self.patch.partition(b"diff --git ")
        return sign.encode() in head and sign.encode() not in rest

    def _shown(self, sign):
        return sign in self.paths and not any(_STEERING.search(text) for pair in self.artifacts for text in pair)
