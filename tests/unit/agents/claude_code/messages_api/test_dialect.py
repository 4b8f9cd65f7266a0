"""Requests that the dialect cannot decode are rejected."""

import json
import time

import msgspec
import pytest

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.interfaces.gateway import Rejected

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


@pytest.mark.parametrize("number", [b"1.7976931348623157e308", b"2.2250738585072012e-308", b"4.9e-324"])
def test_half_a_million_extreme_numbers_are_decoded_quickly(number):
    body = b'{"model": "m", "metadata": [%s]}' % b",".join([number] * 499_000)
    started_at = time.process_time()
    document = DIALECT.decode_request(body)
    assert time.process_time() - started_at < 1.5
    assert isinstance(document, dict)
    assert set(document["metadata"]) == {float(number)}


def test_long_number_is_kept_as_text():
    """Converting 40,000 numbers of this kind would take more than a second."""
    number = f"4.{'9406564584124654417' * 40}e-320"
    body = f'{{"model":"m","metadata":[{",".join([number] * 40_000)}]}}'.encode()
    started_at = time.process_time()
    document = DIALECT.decode_request(body)
    assert time.process_time() - started_at < 0.5
    assert isinstance(document, dict)
    assert msgspec.json.encode(document) == body


@pytest.mark.parametrize("number", ["1.", ".5", "1e", "-.5", "1.5.5", "01.5", "1.5e+", "+1.5", "0x1p3", "1_0.5"])
def test_malformed_number_is_rejected(number):
    for text in (number, number.replace("5", "5" * 40).replace("1", "1" * 40)):
        assert isinstance(DIALECT.decode_request(f'{{"model":"m","metadata":[{text}]}}'.encode()), Rejected)


def test_number_that_is_too_large_for_a_float_is_rejected():
    rejection = DIALECT.decode_request(b'{"model": "m", "metadata": [1e400]}')
    assert isinstance(rejection, Rejected)
    assert rejection.status == 400


def test_number_of_checked_objects_is_limited():
    for count, is_rejected in ((49_999, False), (50_000, True)):
        decision = DIALECT.decode_request(b'{"model": "m", "messages": [%s]}' % b",".join([b"{}"] * count))
        assert isinstance(decision, Rejected) is is_rejected
        assert not isinstance(decision, Rejected) or decision.status == 413
    schema = b'{"properties": [%s]}' % b",".join([b"{}"] * 60_000)
    assert isinstance(DIALECT.decode_request(b'{"model": "m", "tools": [{"input_schema": %s}]}' % schema), dict)
