"""Requests that the dialect cannot decode are rejected."""

import json

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.interfaces.model_dialect import Rejected

LONGEST_STRING = "x" * 256
DIALECT = MessagesApi()


def test_request_must_be_an_object_with_a_string_model():
    for body in (b"{}", b'{"model": ""}', json.dumps({"model": LONGEST_STRING}).encode()):
        assert DIALECT.decode_request(body) == json.loads(body)
    for body in (b"[]", b'"x"', b"null", b"", b'{"model": 1}', b'{"model": null}', b'{"model": ["m"]}'):
        rejection = DIALECT.decode_request(body)
        assert isinstance(rejection, Rejected)
        assert rejection.status == 400
    assert isinstance(DIALECT.decode_request(json.dumps({"model": f"{LONGEST_STRING}x"}).encode()), Rejected)
    assert DIALECT.decode_request(bytearray(b'{"a": 1}')) == {"a": 1}
