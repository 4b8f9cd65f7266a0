"""Probes the runtimes when a server starts, and repeats the probes with backoff while none works."""

import asyncio
import logging
import math
from datetime import datetime, timedelta
from random import SystemRandom

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.images import Image, ProfileCatalog
from sandbox.interfaces.placement import Host, HostIdentity, ProbeResult
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import PROBE_BACKOFF_SECONDS, PROBE_BACKOFF_SECONDS_MAX, PROBE_JITTER
from sandbox.model.resources import Resources
from sandbox.model.wire.events import format_timestamp

_log = logging.getLogger(__name__)
_RANDOM = SystemRandom()


class ProbedHost:
    """A host, and what it can run according to the last probe.

    A working runtime is used until the server ends, so a task's tier never changes.

    The pause before a probe doubles from PROBE_BACKOFF_SECONDS to PROBE_BACKOFF_SECONDS_MAX, and is shortened at random
    by up to PROBE_JITTER.
    """

    def __init__(self, initial_result: ProbeResult, host: Host, clock: Clock) -> None:
        self.result = initial_result
        self._host = host
        self._clock = clock
        self._pause_seconds = PROBE_BACKOFF_SECONDS
        self._due_at: float | None = None
        self._schedule_next()

    @property
    def identity(self) -> HostIdentity:
        """See `Host.identity`."""
        return self._host.identity

    @property
    def capacity(self) -> Resources:
        """See `Host.capacity`."""
        return self._host.capacity

    @property
    def images(self) -> ProfileCatalog:
        """See `Host.images`."""
        return self._host.images

    def memory_available_bytes(self) -> int | None:
        """See `Host.memory_available_bytes`."""
        return self._host.memory_available_bytes()

    @property
    def blocked_reason(self) -> str | None:
        """Why no task can start, and when the next probe is (human-readable); None if tasks can start."""
        return self._failure_reason or self._host.blocked_reason()

    @property
    def _failure_reason(self) -> str | None:
        if self.result.failure is None or self.result.is_final:
            return self.result.failure
        at = self.next_probe_at
        next_probe = "a probe is running" if at is None else f"the next probe is at {format_timestamp(at)}"
        return f"No sandbox can be created; {next_probe}. {self.result.failure}"

    @property
    def next_probe_at(self) -> datetime | None:
        """When the next probe starts; None during a probe or if none is planned."""
        due_at = self._due_at
        return None if due_at is None else self._clock.now() + timedelta(seconds=due_at - self._clock.monotonic())

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds until the next probe; None if none is planned."""
        due_at = self._due_at
        return None if due_at is None else max(1, math.ceil(due_at - self._clock.monotonic()))

    def find_image(self, profile: str) -> Image | None:
        """Return the host's image of a profile, None for the host's own /usr. Raises ImageUnusableError."""
        return self.images.find_image(profile, self.result.tier)

    async def run(self) -> None:
        """Probe until a runtime works or none ever can. Never raises for a failed probe."""
        while self._due_at is not None:
            await asyncio.sleep(self._due_at - self._clock.monotonic())
            self._due_at = None
            try:
                self.result = await self._host.probe()
            except Exception as error:
                _log.warning("The runtimes could not be probed: %s", error_reason(error))
            self._schedule_next()
            self._log_result()

    def _schedule_next(self) -> None:
        if self.result.failure is None or self.result.is_final:
            return
        pause = self._pause_seconds * _RANDOM.uniform(1 - PROBE_JITTER, 1)
        self._due_at = self._clock.monotonic() + pause
        self._pause_seconds = min(self._pause_seconds * 2, PROBE_BACKOFF_SECONDS_MAX)

    def _log_result(self) -> None:
        if self.result.failure is None:
            _log.info("The runtime %s works now, and the server accepts tasks.", self.result.runtime)
        else:
            _log.warning("The server does not accept tasks. %s", self._failure_reason)
