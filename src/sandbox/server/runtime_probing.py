"""Probes the runtimes when a server starts, with backoff while none works, and again on request."""

import asyncio
import logging
import math
from datetime import datetime, timedelta
from random import SystemRandom

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.images import Image, ProfileCatalog
from sandbox.interfaces.placement import Host, HostIdentity, ProbeResult
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import (
    PROBE_INTERVAL_SECONDS,
    PROBE_JITTER,
    PROBE_PAUSE_SECONDS,
    PROBE_PAUSE_SECONDS_MAX,
)
from sandbox.model.resources import Resources
from sandbox.model.wire.task_conversion import format_timestamp

_log = logging.getLogger(__name__)
_RANDOM = SystemRandom()


class ProbedHost:
    """A host, and what it can run according to the last probe.

    A runtime that has worked is used until the server ends, so a task's tier never changes. `request_probe` makes the
    host detect that it no longer works.

    While no runtime works, the pause before a probe doubles from PROBE_PAUSE_SECONDS to PROBE_PAUSE_SECONDS_MAX,
    and is shortened at random by up to PROBE_JITTER.
    """

    def __init__(self, initial_result: ProbeResult, host: Host, clock: Clock) -> None:
        self.result = initial_result
        self._host = host
        self._clock = clock
        self._pause_seconds = PROBE_PAUSE_SECONDS
        self._due_at: float | None = None
        self._probed_at = clock.monotonic()
        self._probe_requested = asyncio.Event()
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
        if self.result.failure is None or self.result.is_permanent:
            return self.result.failure
        at = self.next_probe_at
        next_probe = "a probe is running" if at is None else f"the next probe is at {format_timestamp(at)}"
        return f"No sandbox can be created; {next_probe}. {self.result.failure}"

    @property
    def next_probe_at(self) -> datetime | None:
        """When the next probe starts; None during a probe, if none is planned, or while a runtime works."""
        seconds = self._seconds_until_probe
        return None if seconds is None else self._clock.now() + timedelta(seconds=seconds)

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds until the next probe; None if none is planned, or while a runtime works."""
        seconds = self._seconds_until_probe
        return None if seconds is None else max(1, math.ceil(seconds))

    @property
    def _seconds_until_probe(self) -> float | None:
        due_at = None if self.result.failure is None else self._due_at
        return None if due_at is None else due_at - self._clock.monotonic()

    def find_image(self, profile: str) -> Image | None:
        """Return the host's image of a profile, None for the host's own /usr. Raises ImageUnusableError."""
        return self.images.find_image(profile, self.result.tier)

    def request_probe(self) -> None:
        """Probe a working runtime again, because a sandbox could not be created.

        Probes start at least PROBE_INTERVAL_SECONDS apart, because a task itself may be the cause.
        """
        if self.result.failure is None and self._due_at is None:
            self._due_at = max(self._clock.monotonic(), self._probed_at + PROBE_INTERVAL_SECONDS)
            self._probe_requested.set()

    async def run(self) -> None:
        """Probe while no runtime works, and after `request_probe`, until cancelled. Never raises for a failed probe."""
        while True:
            self._probe_requested.clear()
            if self._due_at is None:
                await self._probe_requested.wait()
            else:
                await asyncio.sleep(self._due_at - self._clock.monotonic())
                self._due_at = None
                has_worked = self.result.failure is None
                self.result = await (self._probe_twice() if has_worked else self._probe())
                self._probed_at = self._clock.monotonic()
                self._schedule_next()
                self._log_result(has_worked=has_worked)

    async def _probe_twice(self) -> ProbeResult:
        """Return a failure only if two probes fail, because the machine may be busy."""
        result = await self._probe()
        if result.failure is None:
            return result
        await asyncio.sleep(PROBE_PAUSE_SECONDS)
        return await self._probe()

    async def _probe(self) -> ProbeResult:
        """Return the result of a probe, or the last result if the probe was not possible."""
        try:
            return await self._host.probe()
        except Exception as error:
            _log.warning("The runtimes could not be probed: %s", error_reason(error))
            return self.result

    def _schedule_next(self) -> None:
        if self.result.failure is None:
            self._pause_seconds = PROBE_PAUSE_SECONDS
            return
        if self.result.is_permanent:
            return
        pause = self._pause_seconds * _RANDOM.uniform(1 - PROBE_JITTER, 1)
        self._due_at = self._clock.monotonic() + pause
        self._pause_seconds = min(self._pause_seconds * 2, PROBE_PAUSE_SECONDS_MAX)

    def _log_result(self, *, has_worked: bool) -> None:
        if self.result.failure is not None:
            _log.warning("The server does not accept tasks. %s", self._failure_reason)
        elif not has_worked:
            _log.info("The runtime %s works now, and the server accepts tasks.", self.result.runtime)
