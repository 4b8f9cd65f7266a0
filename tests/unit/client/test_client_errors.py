"""Which error stands for which answer."""

import json

import pytest

from sandbox import client
from sandbox.client.errors import error_of

SERVER = "http://localhost:8122"


def answer(code: str, details=None) -> bytes:
    return json.dumps({"error": code, "message": "So it is.", "details": details}).encode()


@pytest.mark.parametrize(
    ("status", "code", "family"),
    [
        (400, "invalid_manifest", client.InvalidManifestError),
        (400, "invalid_parameter", client.InvalidRequestError),
        (401, "unauthorized", client.AccessError),
        (403, "forbidden", client.AccessError),
        (404, "task_not_found", client.NotFoundError),
        (404, "artifact_not_found", client.NotFoundError),
        (409, "duplicate_task_id", client.ConflictError),
        (409, "task_already_terminal", client.ConflictError),
        (413, "payload_too_large", client.InvalidManifestError),
        (422, "idempotency_key_reused", client.ConflictError),
        (429, "rate_limit_exceeded", client.RateLimitError),
        (500, "internal_error", client.ServerError),
        (503, "service_unavailable", client.ServerError),
        (507, "insufficient_resources", client.InsufficientResourcesError),
    ],
)
def test_every_code_of_the_api_has_its_family(status, code, family):
    error = error_of(SERVER, status, answer(code, [1]))
    assert type(error) is family
    assert (error.code, error.status, error.message, error.details) == (code, status, "So it is.", [1])


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b"", b"[]", b'"text"', b'{"detail": "Not Found"}', b"\xff"])
def test_an_answer_that_is_not_sandboxs_says_so(body):
    error = error_of(SERVER, 404, body)
    assert type(error) is client.UnexpectedAnswerError
    assert "Check the address" in error.message
    assert not error.retryable


@pytest.mark.parametrize("address", ["localhost:8122", "ftp://localhost", "http://", "http://[", "", "http://h:99999"])
def test_an_address_that_is_none_is_refused_before_anything_is_sent(address):
    with pytest.raises(client.InvalidRequestError, match="http://localhost:8122"):
        client.Client(address)
