"""Resolves the secrets of tasks. The values are sent to a runner and nowhere else."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Secret
from sandbox.model.task import Task

_log = logging.getLogger(__name__)

LookUpSecrets = Callable[[Sequence[Secret]], Awaitable[Mapping[str, str]]]
"""Looks up secrets; returns values by name. Raises SecretUnavailableError."""


class TaskSecrets:
    """Resolves secrets from their sources, which may be external and slow."""

    def __init__(self, look_up: LookUpSecrets) -> None:
        self._look_up = look_up
        self._launches: set[asyncio.Task[object]] = set()

    async def resolve(self, task: Task) -> dict[str, str]:
        """Return the values, keyed by name. Raises only SecretUnavailableError, which hides other errors' texts."""
        try:
            return dict(await self._look_up(task.manifest.secrets))
        except SecretUnavailableError:
            raise
        except Exception as error:
            # Report only the error's type, and do not chain the error: its text may contain a value.
            problem = f"The secrets could not be resolved ({type(error).__name__}); check their source."
        raise SecretUnavailableError(problem)

    async def resolve_for_attempt(self, task: Task) -> Mapping[str, str] | Failure:
        """Return the values, keyed by name. If a value is missing, return the failure that ends the attempt."""
        try:
            return await self.resolve(task)
        except SecretUnavailableError as error:
            _log.warning("Secrets of task %s cannot be resolved: %s", task.id, error.detail, extra={"task_id": task.id})
            detail = error.detail if error.detail != error.message else ""
            return Failure(FailureCode.SECRET_UNAVAILABLE, error.message, detail=detail)

    async def resolve_cancellably(self, task: Task) -> Mapping[str, str] | Failure:
        """Call `resolve_for_attempt`, and let `cancel_lookups` cancel the caller while it is waiting here."""
        launch = asyncio.current_task()
        assert launch is not None
        self._launches.add(launch)
        try:
            return await self.resolve_for_attempt(task)
        finally:
            self._launches.discard(launch)

    def cancel_lookups(self) -> None:
        """Cancel the callers that are waiting in `resolve_cancellably`."""
        for launch in self._launches:
            launch.cancel()
