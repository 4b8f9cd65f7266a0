"""Resolves the secrets of a task, and hides the texts of unexpected errors, which may contain values."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret

ResolveSecrets = Callable[[Sequence[Secret]], Awaitable[Mapping[str, str]]]
"""Resolves secrets to values by name. Raises SecretUnavailableError."""


async def resolve_task_secrets(resolve: ResolveSecrets, secrets: Sequence[Secret]) -> dict[str, str]:
    """Return the values by name. Raises only SecretUnavailableError."""
    try:
        return dict(await resolve(secrets))
    except SecretUnavailableError:
        raise
    except Exception as error:
        # Only the type, and no exception chaining: the text may contain a value.
        problem = f"The secrets could not be resolved ({type(error).__name__}); check their source."
    raise SecretUnavailableError(problem)
