"""A token is shown once; what is kept of it lets nobody in."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from sandbox.auth.token_file import id_of, make_token, matches
from sandbox.interfaces.auth import Principal, Role

NOW = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)


def test_a_token_matches_its_own_record_only():
    token, record = make_token(Role.OPERATOR, "ci", NOW, None)
    other, other_record = make_token(Role.OPERATOR, "ci", NOW, None)
    assert id_of(token) == record.id
    assert matches(token, record)
    assert not matches(other, record)
    assert not matches(token, other_record)
    assert record.principal == Principal(record.id, "ci", Role.OPERATOR)


def test_the_secret_is_not_in_the_record():
    token, record = make_token(Role.VIEWER, "", NOW, None)
    assert token.rpartition("_")[2] not in msgspec.json.encode(record).decode()


def test_a_token_is_recognised_in_texts():
    token, record = make_token(Role.VIEWER, "", NOW, None)
    assert token.startswith(f"sbx_{record.id}_")
    assert len(token) == len("sbx_") + 8 + 1 + 64


@pytest.mark.parametrize(
    "text", ["", "sbx_", "sbx_aaaaaaaa_", "sbx_aaaaaaaa_xyz", "sbx_../../etc_" + "0" * 64, "x" * 10_000]
)
def test_what_is_no_token_has_no_id(text):
    _, record = make_token(Role.VIEWER, "", NOW, None)
    assert id_of(text) is None
    assert not matches(text, record)


def test_a_token_is_good_until_it_expires():
    _, record = make_token(Role.VIEWER, "", NOW, NOW + timedelta(hours=1))
    assert record.is_good(NOW + timedelta(minutes=59))
    assert not record.is_good(NOW + timedelta(hours=1))
    _, endless = make_token(Role.VIEWER, "", NOW, None)
    assert endless.is_good(NOW + timedelta(days=36_500))
