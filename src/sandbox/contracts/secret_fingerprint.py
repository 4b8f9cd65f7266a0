"""By what the values of a task's secrets are known again, without being kept.

A disk on which an agent had other values than one has now may hold what nobody can find on it any more.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path

_SALT_BYTES = 16
_WORK = 2**14
"""Of scrypt: 16 MiB and some 50 ms for each guess."""


def make_fingerprint(secrets: Mapping[str, str]) -> bytes:
    """What is to be kept beside the disk from before an agent has the values."""
    salt = os.urandom(_SALT_BYTES)
    return salt + _digest(secrets, salt)


def has_fingerprint(path: Path, secrets: Mapping[str, str]) -> bool:
    """Whether these are the values that the fingerprint was made of. Raises OSError."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return False
    salt, digest = kept[:_SALT_BYTES], kept[_SALT_BYTES:]
    return hmac.compare_digest(digest, _digest(secrets, salt))


def _digest(secrets: Mapping[str, str], salt: bytes) -> bytes:
    values = json.dumps(secrets, sort_keys=True).encode()
    return hashlib.scrypt(values, salt=salt, n=_WORK, r=8, p=1)
