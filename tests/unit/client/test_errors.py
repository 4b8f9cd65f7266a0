"""Which error stands for which answer."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from sandbox import client
from sandbox.client.errors import API_ERRORS, LOCAL_ERRORS, error_from_response, refine_not_found
from sandbox.client.terminal import open_terminal

SERVER = "http://localhost:8122"


def answer(code: str, details=None, **fields) -> bytes:
    return json.dumps({"error": code, "message": "So it is.", "details": details, **fields}).encode()


@pytest.mark.parametrize(
    ("status", "code", "error", "family"),
    [
        (400, "invalid_manifest", client.InvalidManifestError, client.InvalidManifestError),
        (400, "invalid_parameter", client.InvalidParameterError, client.InvalidRequestError),
        (401, "unauthorized", client.UnauthorizedError, client.AccessError),
        (403, "forbidden", client.ForbiddenError, client.AccessError),
        (404, "task_not_found", client.TaskNotFoundError, client.NotFoundError),
        (404, "artifact_not_found", client.ArtifactNotFoundError, client.NotFoundError),
        (409, "duplicate_task_id", client.DuplicateTaskIdError, client.ConflictError),
        (409, "task_already_terminal", client.TaskAlreadyTerminalError, client.ConflictError),
        (413, "payload_too_large", client.PayloadTooLargeError, client.InvalidManifestError),
        (422, "idempotency_key_reused", client.IdempotencyKeyReusedError, client.ConflictError),
        (429, "rate_limit_exceeded", client.RateLimitError, client.RateLimitError),
        (429, "response_memory_exceeded", client.ResponseMemoryError, client.RateLimitError),
        (500, "internal_error", client.InternalServerError, client.ServerError),
        (503, "service_unavailable", client.ServiceUnavailableError, client.ServerError),
        (507, "insufficient_resources", client.InsufficientResourcesError, client.InsufficientResourcesError),
    ],
)
def test_a_code_has_its_exception_in_its_family(status, code, error, family):
    found = error_from_response(SERVER, status, answer(code, [1]))
    assert type(found) is error
    assert isinstance(found, family)
    assert (found.code, found.status, found.message, found.details) == (code, status, "So it is.", [1])


def listed(section: str) -> list[str]:
    """The codes of a section of docs/errors.md."""
    text = (Path(__file__).parents[3] / "docs" / "errors.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)`", text, re.MULTILINE)


def test_every_code_of_the_documents_has_one_exception():
    assert [error.code for error in API_ERRORS] == listed("Answers of the API")
    assert [error.code for error in LOCAL_ERRORS] == listed("Of the client")


def test_every_exception_is_public():
    assert {error.__name__ for error in (*API_ERRORS, *LOCAL_ERRORS)} <= set(client.__all__)


@pytest.mark.parametrize(
    ("status", "family"),
    [(404, "NotFoundError"), (418, "InvalidRequestError"), (599, "ServerError")],
)
def test_a_code_of_a_newer_server_is_known_by_its_family(status, family):
    found = refine_not_found(error_from_response(SERVER, status, answer("brand_new")), SERVER, "/api/v1/tasks")
    assert (type(found).__name__, found.code) == (family, "brand_new")


@pytest.mark.parametrize("path", ["/api/v1/tasks", "/api/v1/tasks/a/terminal", "/api/v1/admin/drain"])
def test_an_address_that_the_server_does_not_know_says_nothing_of_tasks(path):
    told = answer("not_found", request_id="r-1")
    found = refine_not_found(error_from_response(SERVER, 404, told), SERVER, path)
    assert (type(found).__name__, found.status, found.request_id) == ("UnexpectedAnswerError", 404, "r-1")
    kept = refine_not_found(error_from_response(SERVER, 404, told), SERVER, "/api/v1/tasks/a/vm")
    assert type(kept).__name__ == "NotFoundError"


def test_the_fields_of_an_error_are_its_attributes():
    existing = {"id": "a", "state": "running", "created_at": "2026-01-29T10:10:01.000Z"}
    assert (
        error_from_response(SERVER, 409, answer("duplicate_task_id", existing_task=existing)).existing_task == existing
    )
    assert error_from_response(SERVER, 409, answer("task_already_terminal", task_state="failed")).task_state == "failed"
    figures = {"requested_cpus": 64, "available_cpus": 8, "requested_memory": "1024G", "available_memory": "64G"}
    found = error_from_response(SERVER, 507, answer("insufficient_resources", **figures))
    assert {name: getattr(found, name) for name in figures} == figures
    mistake = {"field": "vm.cpus", "rule": "range", "message": "must be …", "line": 4, "column": 9}
    assert error_from_response(SERVER, 400, answer("invalid_manifest", [mistake])).mistakes == [mistake]
    error = error_from_response(SERVER, 503, answer("service_unavailable", request_id="r-1"), "5")
    assert error.request_id == "r-1"
    assert error.told == error.body == json.loads(answer("service_unavailable", request_id="r-1"))


def test_fields_that_make_no_sense_are_left_out_and_do_no_harm():
    assert error_from_response(SERVER, 409, answer("duplicate_task_id", existing_task=3)).existing_task is None
    assert (
        error_from_response(SERVER, 507, answer("insufficient_resources", requested_cpus="many")).requested_cpus is None
    )
    assert error_from_response(SERVER, 400, answer("invalid_manifest", "no list")).mistakes == []
    assert error_from_response(SERVER, 429, answer("rate_limit_exceeded"), "tomorrow").retry_after_seconds is None


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b"", b"[]", b'"text"', b'{"detail": "Not Found"}', b"\xff"])
def test_an_answer_that_is_not_sandboxs_says_so(body):
    error = error_from_response(SERVER, 404, body)
    assert type(error) is client.UnexpectedAnswerError
    assert "Check the address" in error.message
    assert not error.retryable


NO_ADDRESSES = [
    "localhost:8122",
    "ftp://localhost",
    "http://",
    "http://[",
    "",
    "http://h:0",
    "http://h:99999",
    "http://a..b",
    "http://.",
    f"http://{'a' * 64}.b",
    "http://xn--/",
    "http://ä..ö",
    "http://h\r",
    "http://h/?x=1",
    "http://h/#x",
    "http://h/\udcff",
    f"http://h/{'a' * 70_000}",
]


@pytest.mark.parametrize("client_class", [client.Client, client.AsyncClient])
@pytest.mark.parametrize("address", NO_ADDRESSES, ids=lambda address: ascii(address[:20]))
def test_an_address_that_is_none_is_refused_before_anything_is_sent(address, client_class):
    with pytest.raises(client.InvalidParameterError, match="http://localhost:8122"):
        client_class(address)


@pytest.mark.parametrize("address", NO_ADDRESSES, ids=lambda address: ascii(address[:20]))
def test_a_terminal_is_not_asked_for_at_an_address_that_is_none(address):
    async def ask():
        async with open_terminal(address, None, "t"):
            pass

    with pytest.raises(client.InvalidParameterError, match="http://localhost:8122"):
        asyncio.run(ask())


@pytest.mark.parametrize("client_class", [client.Client, client.AsyncClient])
@pytest.mark.parametrize(
    "address", ["http://u:s3cr3t@h", "http://s3cr3t@h", "http://u:s3/cr#3t@h", "u:s3cr3t@a..b", "http://@h"]
)
def test_an_address_with_credentials_is_refused_without_telling_them(address, client_class):
    with pytest.raises(client.InvalidParameterError, match="--token or SANDBOX_TOKEN") as caught:
        client_class(address)
    assert not re.search("s3|3t", caught.value.message)
