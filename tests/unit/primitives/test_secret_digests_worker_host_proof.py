"""A proof is valid for exactly one key, challenge, attempt, host, worker and server."""

import hashlib
import hmac

import pytest

from sandbox.primitives.secret_digests import compute_host_proof, is_host_proof

ARGUMENTS = {
    "key": b"k" * 32,
    "challenge": b"c" * 32,
    "attempt_id": "abcdefghijkl",
    "host": "n1",
    "worker_nonce": b"w" * 32,
    "certificate_fingerprint": "ab" * 32,
}
PROOF = compute_host_proof(**ARGUMENTS)


def test_proof_is_an_hmac_of_all_fields_with_their_lengths():
    fields = (
        *(b"Sandbox: the host of a worker, 1", b"c" * 32, b"abcdefghijkl", b"n1", b"w" * 32),
        bytes.fromhex("ab" * 32),
    )
    message = b"".join(bytes([0, 0, 0, len(field)]) + field for field in fields)
    assert hmac.new(b"k" * 32, message, hashlib.sha256).digest() == PROOF
    assert is_host_proof(compute_host_proof(**ARGUMENTS), PROOF)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"K" + b"k" * 31},
        {"challenge": b"C" + b"c" * 31},
        {"attempt_id": "abcdefghijkm"},
        {"host": "n2"},
        {"worker_nonce": b"W" + b"w" * 31},
        {"certificate_fingerprint": "ac" + "ab" * 31},
        {"attempt_id": "abcdefghijk", "host": "ln1"},
        {"host": "n", "worker_nonce": b"1" + b"w" * 32},
    ],
)
def test_proof_depends_on_each_field_and_on_the_boundaries_between_fields(changes):
    assert not is_host_proof(compute_host_proof(**ARGUMENTS | changes), PROOF)


@pytest.mark.parametrize("proof", [b"", PROOF[:-1], PROOF + b"x", bytes(32), ARGUMENTS["challenge"]])
def test_other_bytes_are_not_a_proof(proof):
    assert not is_host_proof(proof, PROOF)
