"""The one sentence about a value that cannot be had."""

from sandbox.contracts.secret_source import SecretUnavailableError
from sandbox.model.errors import secrets_missing
from sandbox.model.manifest import Secret


def unavailable(secret: Secret, what: str) -> SecretUnavailableError:
    """`what` says what is wrong and what to do. It must not hold a value: operators read it with the task."""
    detail = f"Secret {secret.name} (source {secret.source}, key {secret.key}): {what}"
    return SecretUnavailableError(secrets_missing([secret.name]), detail)
