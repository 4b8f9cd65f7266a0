"""Floor 3: the Python client of the REST API. The command line uses nothing else to reach the server."""

from sandbox.client.client import Client
from sandbox.client.errors import (
    AccessError,
    ChecksumError,
    ClientError,
    ConflictError,
    InsufficientResourcesError,
    InvalidManifestError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ServerError,
    UnexpectedAnswerError,
    UnreachableError,
)

__all__ = [
    "AccessError",
    "ChecksumError",
    "Client",
    "ClientError",
    "ConflictError",
    "InsufficientResourcesError",
    "InvalidManifestError",
    "InvalidRequestError",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "UnexpectedAnswerError",
    "UnreachableError",
]
