"""The credentials of a request."""

import pytest
from starlette.requests import HTTPConnection

from sandbox.api.authentication import extract_credentials


@pytest.mark.parametrize("name", ["authorization", "cookie"])
def test_long_credentials_are_truncated(name: str):
    prefix = {"authorization": "Bearer ", "cookie": "sandbox_session="}[name]
    for length, kept in ((511, 511), (512, 512), (513, 512)):
        headers = [(name.encode(), f"{prefix}{'x' * length}".encode())]
        credentials = extract_credentials(HTTPConnection({"type": "http", "headers": headers}))
        assert credentials is not None
        assert credentials.value == "x" * kept
