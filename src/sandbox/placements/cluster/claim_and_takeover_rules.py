"""Decides which worker may claim an attempt, and when its journal may be taken over. No I/O and no clock."""

from enum import StrEnum
from hmac import compare_digest
from typing import NamedTuple

from sandbox.interfaces.cluster_engine import JobPhase

LEASE_MARGIN_SECONDS = 30.0
LEASE_MARGIN_FRACTION = 0.025
"""How long the server waits after the end of a lease: the minimum, and the fraction of the lease.

The wait covers late packets, and clocks that each run up to 1 % too fast or too slowly.
"""

CLAIM_TIMEOUT_SECONDS = 300.0
"""How long a worker that the engine has started may take to claim its attempt."""

LAST_RECORDS_TIMEOUT_SECONDS = 15.0
"""How long the connection of a worker whose job has ended may stay open to receive the last records."""


class Decision(StrEnum):
    """What the server does about the worker of an attempt.

    WAIT: nothing.
    SUBMIT: submit the job again; the engine does not have it.
    REPLACE: abandon a job whose worker has not claimed the attempt, and submit another one.
    TAKE_OVER: abandon a worker that has claimed the attempt, and continue the journal.
    """

    WAIT = "wait"
    SUBMIT = "submit"
    REPLACE = "replace"
    TAKE_OVER = "take_over"


class Observation(NamedTuple):
    """What the server has observed about a worker.

    is_claimed: a worker has claimed the attempt.
    is_connected: the worker's connection is open.
    seconds_since_answer: time since the server's last answer to the worker. At most the time since this server started,
        because an earlier server may have answered until then.
    phase: the last phase that the engine reported; None if the engine is not responding.
    phase_seconds: how long the engine has reported this phase.
    """

    is_claimed: bool
    is_connected: bool
    seconds_since_answer: float
    phase: JobPhase | None
    phase_seconds: float = 0.0


def decide(observed: Observation, lease_seconds: float) -> Decision:
    """Decide about a worker.

    A worker that has not claimed its attempt cannot communicate, so it can be replaced at any time. After the claim,
    the only proof that the worker cannot communicate is the end of the job, reported by the engine, or the end of the
    lease.
    """
    if not observed.is_claimed:
        return _decide_unclaimed(observed)
    if observed.seconds_since_answer >= takeover_seconds(lease_seconds):
        return Decision.TAKE_OVER
    is_done_sending = not observed.is_connected or observed.phase_seconds >= LAST_RECORDS_TIMEOUT_SECONDS
    if observed.phase is JobPhase.ENDED and is_done_sending:
        return Decision.TAKE_OVER
    return Decision.WAIT


def takeover_seconds(lease_seconds: float) -> float:
    """Return how long after its last answer to a worker the server must wait before taking over the journal."""
    return lease_seconds + max(LEASE_MARGIN_SECONDS, lease_seconds * LEASE_MARGIN_FRACTION)


def _decide_unclaimed(observed: Observation) -> Decision:
    match observed.phase:
        case JobPhase.UNKNOWN:
            return Decision.SUBMIT
        case JobPhase.ENDED | JobPhase.UNREACHABLE:
            return Decision.REPLACE
        case JobPhase.RUNNING if observed.phase_seconds >= CLAIM_TIMEOUT_SECONDS:
            return Decision.REPLACE
    return Decision.WAIT


class ClaimState(NamedTuple):
    """What is stored about the claim of an attempt.

    token_hashes: the hashes of the join tokens of all submissions.
    nonce_hash: the hash of the nonce of the worker that has claimed the attempt; None before the claim.
    is_abandoned: the attempt was replaced or taken over, or its worker sent an invalid message.
    """

    token_hashes: tuple[bytes, ...]
    nonce_hash: bytes | None
    is_abandoned: bool


def may_claim(state: ClaimState, token_hash: bytes, nonce_hash: bytes) -> bool:
    """Return whether a worker may claim the attempt.

    The first worker with a valid token gets the attempt. It may repeat its claim, because the answer may be lost.
    """
    is_valid = any(compare_digest(token_hash, known) for known in state.token_hashes)
    if state.is_abandoned or not is_valid:
        return False
    return state.nonce_hash is None or compare_digest(state.nonce_hash, nonce_hash)
