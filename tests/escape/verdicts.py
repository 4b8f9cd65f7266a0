"""What came of a battlefield, for a table: by kind and name, whether the attack was held and its twin worked."""

import re

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
from escape.battery import HUNG, THROUGH
from escape.battlefield import ATTACKS, HOST, HOST_ADDRESS

ON_THE_WIRE = "a packet to anything that is not allowed"
ASKED = "a request at the allowed host that was to be refused"
SEEN = (ON_THE_WIRE, ASKED)
"""What shows only from outside: over all attacks together."""

_BROKEN = {
    *("AttributeError", "ImportError", "IndexError", "ModuleNotFoundError"),
    *("NameError", "SyntaxError", "TypeError", "UnboundLocalError"),
}
"""How code ends by a fault of its own, whoever refuses it what."""

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def judge(field):
    """`{kind: {name: (held, what came of it)}}`; what was not played is not in it."""
    return {
        **{kind: _judge_attacks(attacks, field.results.get(kind, {})) for kind, attacks in ATTACKS.items()},
        "collection": _judge_traps(field),
        "outside": _judge_from_outside(field),
    }


def is_held(came_of_it):
    """The attack failed, rather than not to be done in time or to be broken, and its twin had its way."""
    attack, twin = came_of_it["attack"], came_of_it["twin"]
    return attack not in {THROUGH, HUNG} and attack.partition(":")[0] not in _BROKEN and twin == THROUGH


def _judge_attacks(attacks, results):
    played = {one.name: results[one.name] for one in attacks if {"attack", "twin"} <= results.get(one.name, {}).keys()}
    return {name: (is_held(came_of_it), str(came_of_it)) for name, came_of_it in played.items()}


def _judge_from_outside(field):
    strange = field.sent - field.allowed
    hosts = {host.removesuffix(":80").removesuffix(":443") for _, _, host in field.asked}
    # Being sent elsewhere begins with a good request, and names where to.
    refused = [line for _, line, _ in field.asked if "other.example" in line and "/away/" not in line]
    return {
        ON_THE_WIRE: (not strange and ("tcp", HOST_ADDRESS, 443) in field.sent, f"sent: {sorted(strange)}"),
        ASKED: (hosts == {HOST} and not refused, f"asked: {hosts}, {refused}"),
    }


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
    return {trap.name: (found.holds(trap), f"{trap.must}: {trap.sign}") for trap in TRAPS}


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
