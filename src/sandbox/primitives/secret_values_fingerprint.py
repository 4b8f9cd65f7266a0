"""Fingerprints of secret values. They show whether the values have changed, without revealing them."""

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
