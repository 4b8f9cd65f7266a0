"""Digests of secrets, which prove something about a secret without revealing it.

A fingerprint shows whether the secret values of a task have changed. The proof of a worker's host shows that the host
has a key.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path

_SALT_BYTES = 16
_SCRYPT_COST = 2**14
"""scrypt cost: 16 MiB and about 50 ms per guess."""


def make_fingerprint(secrets: Mapping[str, str]) -> bytes:
    """Create a fingerprint of the values. It is stored next to the disk before an agent gets the values."""
    salt = os.urandom(_SALT_BYTES)
    return salt + _digest(secrets, salt)


def matches_fingerprint(path: Path, secrets: Mapping[str, str]) -> bool:
    """Return whether the fingerprint was made from these values. Raises OSError."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return False
    salt, digest = stored[:_SALT_BYTES], stored[_SALT_BYTES:]
    return hmac.compare_digest(digest, _digest(secrets, salt))


def _digest(secrets: Mapping[str, str], salt: bytes) -> bytes:
    values = json.dumps(secrets, sort_keys=True).encode()
    return hashlib.scrypt(values, salt=salt, n=_SCRYPT_COST, r=8, p=1)


_PURPOSE = b"Sandbox: the host of a worker, 1"


def compute_host_proof(
    key: bytes, challenge: bytes, attempt_id: str, host: str, worker_nonce: bytes, certificate_fingerprint: str
) -> bytes:
    """Return the proof for one challenge.

    worker_nonce: the nonce in the worker's claim.
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
