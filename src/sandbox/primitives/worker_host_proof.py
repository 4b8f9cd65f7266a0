"""The proof that a worker runs on its host: it shows that the host has a key, without revealing the key."""

import hmac

_PURPOSE = b"Sandbox: the host of a worker, 1"


def compute_host_proof(
    key: bytes, challenge: bytes, attempt_id: str, host: str, worker_nonce: bytes, certificate_fingerprint: str
) -> bytes:
    """Return the proof for one challenge.

    worker_nonce: the random number in the worker's claim.
    certificate_fingerprint: SHA-256 (hex) of the certificate that the server presented, so that no other server can
        pass the proof on.
    """
    parts = (
        _PURPOSE,
        challenge,
        attempt_id.encode(),
        host.encode(),
        worker_nonce,
        bytes.fromhex(certificate_fingerprint),
    )
    # The lengths make the message unambiguous.
    message = b"".join(len(part).to_bytes(4) + part for part in parts)
    return hmac.digest(key, message, "sha256")


def is_host_proof(proof: bytes, expected: bytes) -> bool:
    """Return whether the proof is the expected one. The comparison takes constant time."""
    return hmac.compare_digest(proof, expected)
