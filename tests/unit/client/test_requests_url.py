"""Each name is encoded as one URL path segment."""

import pytest

from sandbox.client import InvalidParameterError, TaskNotFoundError
from sandbox.client.requests import task_path, validate_base_url


def test_name_is_encoded_as_one_segment():
    assert task_path("fix-42", "artifacts", "out/a b.txt") == "/tasks/fix-42/artifacts/out%2Fa%20b.txt"


def test_dot_segments_are_encoded():
    assert task_path("..", "artifacts", ".") == "/tasks/%2E%2E/artifacts/%2E"


@pytest.mark.parametrize("task_id", ["fix-42/vm", "/", "fix-42/"])
def test_task_id_with_slash_is_rejected(task_id):
    with pytest.raises(TaskNotFoundError, match="ids contain no slashes"):
        task_path(task_id)


def test_empty_task_id_is_rejected():
    with pytest.raises(InvalidParameterError, match="must not be empty"):
        task_path("", "logs")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost:9122", "http://localhost:9122"),
        ("LOCALHOST/base/", "http://localhost/base"),
        ("dev.localhost:9122", "http://dev.localhost:9122"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("[::1]:9122", "http://[::1]:9122"),
        ("https://localhost:9122", "https://localhost:9122"),
    ],
)
def test_scheme_may_be_omitted_for_an_address_of_this_machine(address, url):
    assert validate_base_url(address) == url


@pytest.mark.parametrize(
    "address",
    [
        "sandbox.example.com",
        "localhost.example.com:80",
        "127.0.0.1.example.com",
        "[::1].example.com",
        "example.com/localhost",
        "10.0.0.5:8122",
        "http:localhost",
        "//localhost",
        "prod",
    ],
)
def test_scheme_is_required_for_any_other_address(address):
    with pytest.raises(InvalidParameterError, match="Only localhost needs no https:// or http://"):
        validate_base_url(address)


def test_port_of_an_address_without_a_scheme_is_checked():
    with pytest.raises(InvalidParameterError, match="must look like"):
        validate_base_url("localhost:99999")
