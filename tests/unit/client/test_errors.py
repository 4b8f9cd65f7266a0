"""The exception for each error response."""

import json
import re
from pathlib import Path

import pytest

from sandbox import client
from sandbox.client.errors import API_ERRORS, LOCAL_ERRORS, error_from_response, refine_not_found
from sandbox.client.terminal import open_terminal

SERVER = "http://localhost:8122"


def error_body(code: str, details=None, **fields) -> bytes:
    return json.dumps({"error": code, "message": "Message.", "details": details, **fields}).encode()


@pytest.mark.parametrize(
    ("status", "code", "error", "family"),
    [
        (400, "invalid_manifest", client.InvalidManifestError, client.InvalidManifestError),
        (400, "invalid_parameter", client.InvalidParameterError, client.InvalidRequestError),
        (401, "unauthorized", client.UnauthorizedError, client.AccessError),
        (403, "forbidden", client.ForbiddenError, client.AccessError),
        (404, "task_not_found", client.TaskNotFoundError, client.NotFoundError),
        (404, "artifact_not_found", client.ArtifactNotFoundError, client.NotFoundError),
        (404, "sandbox_not_found", client.SandboxNotFoundError, client.NotFoundError),
        (404, "host_not_found", client.HostNotFoundError, client.NotFoundError),
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
def test_code_maps_to_its_exception_class(status, code, error, family):
    raised = error_from_response(SERVER, status, error_body(code, [1]))
    assert type(raised) is error
    assert isinstance(raised, family)
    assert (raised.code, raised.status, raised.message, raised.details) == (code, status, "Message.", [1])


def documented_codes(section: str) -> list[str]:
    """Return the codes in a section of docs/errors.md."""
    text = (Path(__file__).parents[3] / "docs" / "errors.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)`", text, re.MULTILINE)


def test_each_documented_code_has_one_exception():
    assert [error.code for error in API_ERRORS] == documented_codes("API errors")
    assert [error.code for error in LOCAL_ERRORS] == documented_codes("Client errors")


def test_all_exceptions_are_public():
    assert {error.__name__ for error in (*API_ERRORS, *LOCAL_ERRORS)} <= set(client.__all__)


@pytest.mark.parametrize(
    ("status", "family"),
    [(404, "NotFoundError"), (418, "InvalidRequestError"), (599, "ServerError")],
)
def test_unknown_code_maps_to_the_base_class_for_its_status(status, family):
    raised = refine_not_found(error_from_response(SERVER, status, error_body("brand_new")), SERVER, "/api/v1/tasks")
    assert (type(raised).__name__, raised.code) == (family, "brand_new")


@pytest.mark.parametrize("path", ["/api/v1/tasks", "/api/v1/tasks/a/terminal", "/api/v1/admin/drain"])
def test_unknown_path_raises_unexpected_response_error(path):
    body = error_body("not_found", request_id="r-1")
    raised = refine_not_found(error_from_response(SERVER, 404, body), SERVER, path)
    assert (type(raised).__name__, raised.status, raised.request_id) == ("UnexpectedResponseError", 404, "r-1")
    unrefined = refine_not_found(error_from_response(SERVER, 404, body), SERVER, "/api/v1/tasks/a/vm")
    assert type(unrefined).__name__ == "NotFoundError"


def test_error_fields_become_attributes():
    existing_task = {"id": "a", "state": "running", "created_at": "2026-01-29T10:10:01.000Z"}
    assert (
        error_from_response(SERVER, 409, error_body("duplicate_task_id", existing_task=existing_task)).existing_task
        == existing_task
    )
    assert (
        error_from_response(SERVER, 409, error_body("task_already_terminal", task_state="failed")).task_state
        == "failed"
    )
    assert error_from_response(SERVER, 404, error_body("sandbox_not_found", task_state="failed")).task_state == "failed"
    amounts = {"requested_cpus": 64, "available_cpus": 8, "requested_memory": "1024G", "available_memory": "64G"}
    raised = error_from_response(SERVER, 507, error_body("insufficient_resources", **amounts))
    assert {name: getattr(raised, name) for name in amounts} == amounts
    field_error = {"field": "vm.cpus", "rule": "range", "message": "must be …", "line": 4, "column": 9}
    for code in ("invalid_manifest", "invalid_parameter"):
        assert error_from_response(SERVER, 400, error_body(code, [field_error])).field_errors == [field_error]
    assert error_from_response(SERVER, 404, error_body("task_not_found")).field_errors == []
    error = error_from_response(SERVER, 503, error_body("service_unavailable", request_id="r-1"), "5")
    assert error.request_id == "r-1"
    assert error.body == json.loads(error_body("service_unavailable", request_id="r-1"))


def field_errors(count):
    return [
        {"location": f"body.vm.{number}", "field": f"vm.{number}", "message": "must be …"} for number in range(count)
    ]


@pytest.mark.parametrize("code", ["invalid_manifest", "invalid_parameter"])
def test_text_of_an_exception_lists_the_first_five_errors(code):
    listed = [f"  body.vm.{number}: must be …" for number in range(5)]
    error = error_from_response(SERVER, 400, error_body(code, field_errors(5)))
    assert str(error).splitlines() == ["Message.", *listed]
    assert error.message == "Message."
    error = error_from_response(SERVER, 400, error_body(code, field_errors(7)))
    assert str(error).splitlines() == ["Message.", *listed, "  and 2 more"]


def test_text_of_an_exception_without_field_errors_is_its_message():
    assert str(error_from_response(SERVER, 404, error_body("task_not_found"))) == "Message."
    assert str(error_from_response(SERVER, 400, error_body("invalid_manifest", "no list"))) == "Message."


def test_text_of_an_exception_accepts_errors_without_a_location():
    details = [{"field": "vm.cpus", "message": "must be …"}, {"message": "is empty"}, {}]
    error = error_from_response(SERVER, 400, error_body("invalid_manifest", details))
    assert str(error).splitlines() == ["Message.", "  vm.cpus: must be …", "  is empty", "  "]


def test_malformed_error_fields_are_ignored():
    assert error_from_response(SERVER, 409, error_body("duplicate_task_id", existing_task=3)).existing_task is None
    assert (
        error_from_response(SERVER, 507, error_body("insufficient_resources", requested_cpus="many")).requested_cpus
        is None
    )
    assert error_from_response(SERVER, 400, error_body("invalid_manifest", "no list")).field_errors == []
    assert error_from_response(SERVER, 429, error_body("rate_limit_exceeded"), "tomorrow").retry_after_seconds is None


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b"", b"[]", b'"text"', b'{"detail": "Not Found"}', b"\xff"])
def test_response_of_another_program_raises_unexpected_response_error(body):
    error = error_from_response(SERVER, 404, body)
    assert type(error) is client.UnexpectedResponseError
    assert "Check the address" in error.message
    assert not error.retryable


INVALID_URLS = [
    "example.com:8122",
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
@pytest.mark.parametrize("address", INVALID_URLS, ids=lambda address: ascii(address[:20]))
def test_invalid_url_is_rejected_before_a_request(address, client_class):
    with pytest.raises(client.InvalidParameterError, match="http://localhost:8122"):
        client_class(address)


@pytest.mark.parametrize("address", INVALID_URLS, ids=lambda address: ascii(address[:20]))
async def test_terminal_rejects_an_invalid_url(address):
    async def connect():
        async with open_terminal(address, None, "t"):
            pass

    with pytest.raises(client.InvalidParameterError, match="http://localhost:8122"):
        await connect()


@pytest.mark.parametrize("client_class", [client.Client, client.AsyncClient])
@pytest.mark.parametrize(
    "address", ["http://u:s3cr3t@h", "http://s3cr3t@h", "http://u:s3/cr#3t@h", "u:s3cr3t@a..b", "http://@h"]
)
def test_url_with_credentials_is_rejected_without_showing_the_credentials(address, client_class):
    with pytest.raises(client.InvalidParameterError, match="--token or SANDBOX_TOKEN") as caught:
        client_class(address)
    assert not re.search("s3|3t", caught.value.message)
