"""What one client may use: its rate of requests, its concurrent requests and streams, its share of the event loop."""

from __future__ import annotations

import ipaddress
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox.api.errors import TooManyStreamsError
from sandbox.interfaces.auth import Principal
from sandbox.primitives.fair_client_shares import FairShare, FairShares

CONCURRENT_REQUESTS_MAX = 1000
"""Maximum number of concurrent requests per token, including streams; further requests get 429."""

ALL_TASKS_STREAMS_MAX = 100
"""Maximum number of concurrent all-task streams per token; further streams get 429. Each stream encodes every event."""

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

    def throttle_seconds(self, client: str) -> int:
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


class ClientLimits:
    """The limits of all clients, and what each client uses now. A client is a token, or an address without a token.

    requests_per_minute: 0 means unlimited.
    """

    def __init__(self, requests_per_minute: int, monotonic: Callable[[], float]) -> None:
        self._rate_limiter = RateLimiter(requests_per_minute, monotonic)
        self._requests_in_progress: Counter[str] = Counter()
        self._all_tasks_streams: Counter[str] = Counter()
        self._shares = FairShares()

    def throttle_seconds(self, principal: Principal | None, address: str | None) -> int:
        """Count one request toward the rate of its client.

        Return 0 if it is allowed; otherwise, return the number of seconds to wait before retrying.
        """
        client = f"token {principal.id}" if principal else client_key(address)
        if wait_seconds := self._rate_limiter.throttle_seconds(client):
            return wait_seconds
        return int(principal is not None and self._requests_in_progress[principal.id] >= CONCURRENT_REQUESTS_MAX)

    @contextmanager
    def count_request(self, principal: Principal | None) -> Iterator[None]:
        """Count a request while it is being processed. Requests without a token are not counted."""
        name = principal.id if principal else ""
        self._requests_in_progress[name] += bool(name)
        try:
            yield
        finally:
            self._requests_in_progress[name] -= bool(name)
            if not self._requests_in_progress[name]:
                del self._requests_in_progress[name]

    def fair_share_of(self, principal: Principal | None) -> FairShare:
        """Return the client's share of the event loop. All clients without a token share one."""
        return self._shares.of(principal.id if principal else "-")

    @contextmanager
    def reserved_all_tasks_stream(self, principal: Principal | None) -> Iterator[None]:
        """Count an all-task stream while it is open. Raises TooManyStreamsError."""
        name = principal.id if principal else "-"
        if self._all_tasks_streams[name] >= ALL_TASKS_STREAMS_MAX:
            raise TooManyStreamsError(ALL_TASKS_STREAMS_MAX)
        self._all_tasks_streams[name] += 1
        try:
            yield
        finally:
            self._all_tasks_streams[name] -= 1
            if not self._all_tasks_streams[name]:
                del self._all_tasks_streams[name]
