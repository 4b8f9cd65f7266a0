"""Rate limiting of requests, with a token bucket per client."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

CLIENTS_MAX = 10_000
"""Maximum number of buckets. Beyond it, the least recently used bucket is dropped; its client gets a new, full one."""

_IPV6_NETWORK_BITS = 64


@dataclass(slots=True)
class _Bucket:
    tokens: float
    updated_at_seconds: float


class RateLimiter:
    """Token buckets of `per_minute` requests that refill within a minute; 0 means unlimited. Performs no I/O."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._monotonic = monotonic
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def acquire(self, client: str) -> int:
        """Count one request.

        Return 0 if it is allowed; otherwise, return the number of seconds to wait before retrying.
        """
        if self._per_minute == 0:
            return 0
        now, rate = self._monotonic(), self._per_minute / 60
        bucket = self._buckets.pop(client, None) or _Bucket(self._per_minute, now)
        bucket.tokens = min(bucket.tokens + (now - bucket.updated_at_seconds) * rate, self._per_minute)
        bucket.updated_at_seconds = now
        self._buckets[client] = bucket
        if len(self._buckets) > CLIENTS_MAX:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            return math.ceil((1 - bucket.tokens) / rate)
        bucket.tokens -= 1
        return 0


def client_key(address: str | None) -> str:
    """Return the rate limit key of an address: the address itself, or its /64 for IPv6.

    An IPv6 client usually owns a whole /64.
    """
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "address -"
    if parsed.version == 4 or parsed.is_loopback:
        return f"address {parsed}"
    if parsed.ipv4_mapped is not None:
        return f"address {parsed.ipv4_mapped}"
    return f"address {ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False)}"
