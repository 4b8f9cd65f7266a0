"""Builds the error for a secret that has no usable value."""

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.failure import missing_secrets_message
from sandbox.model.manifest.schema import Secret


def unavailable_error(secret: Secret, reason: str) -> SecretUnavailableError:
    """Build the error for a secret whose value cannot be used.

    reason: the problem and its fix, for operators. It must not contain the value.
    """
    detail = f"Secret {secret.name} (source {secret.source}, key {secret.key}): {reason}"
    return SecretUnavailableError(missing_secrets_message([secret.name]), detail)
