"""Tokens are shown only once. The stored records cannot be used to gain access."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from sandbox.access_tokens.token_file import generate_token, parse_token_id, verify_token
from sandbox.interfaces.auth import Principal, Role

NOW = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)


def test_token_matches_only_its_own_record():
    token, record = generate_token(Role.OPERATOR, "ci", NOW, None)
    other, other_record = generate_token(Role.OPERATOR, "ci", NOW, None)
    assert parse_token_id(token) == record.id
    assert verify_token(token, record)
    assert not verify_token(other, record)
    assert not verify_token(token, other_record)
    assert record.principal == Principal(record.id, "ci", Role.OPERATOR)


def test_record_does_not_contain_the_secret():
    token, record = generate_token(Role.VIEWER, "", NOW, None)
    assert token.rpartition("_")[2] not in msgspec.json.encode(record).decode()


def test_token_has_fixed_prefix_and_length():
    token, record = generate_token(Role.VIEWER, "", NOW, None)
    assert token.startswith(f"sbx_{record.id}_")
    assert len(token) == len("sbx_") + 8 + 1 + 64


@pytest.mark.parametrize(
    "text", ["", "sbx_", "sbx_aaaaaaaa_", "sbx_aaaaaaaa_xyz", "sbx_../../etc_" + "0" * 64, "x" * 10_000]
)
def test_malformed_token_has_no_id(text):
    _, record = generate_token(Role.VIEWER, "", NOW, None)
    assert parse_token_id(text) is None
    assert not verify_token(text, record)


def test_token_is_valid_until_it_expires():
    _, record = generate_token(Role.VIEWER, "", NOW, NOW + timedelta(hours=1))
    assert record.is_valid(NOW + timedelta(minutes=59))
    assert not record.is_valid(NOW + timedelta(hours=1))
    _, endless = generate_token(Role.VIEWER, "", NOW, None)
    assert endless.is_valid(NOW + timedelta(days=36_500))
