"""One client cannot take the server for itself; others are not held up by it."""

import pytest

from sandbox.api.auth.rate_limit import CLIENTS_MAX, RateLimiter, client_key


class Time:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_client_may_ask_as_often_as_was_said_and_again_after_a_while():
    time = Time()
    limit = RateLimiter(60, time)
    assert [limit.acquire("a") for _ in range(60)] == [0] * 60
    assert limit.acquire("a") == 1
    assert limit.acquire("b") == 0
    time.seconds += 1
    assert limit.acquire("a") == 0
    assert limit.acquire("a") == 1
    time.seconds += 3600
    assert [limit.acquire("a") for _ in range(61)] == [0] * 60 + [1]


def test_a_small_allowance_says_how_long_to_wait():
    limit = RateLimiter(2, Time())
    assert [limit.acquire("a") for _ in range(3)] == [0, 0, 30]


def test_zero_means_no_limit():
    limit = RateLimiter(0, Time())
    assert {limit.acquire("a") for _ in range(1000)} == {0}


def test_only_so_many_clients_are_remembered():
    limit = RateLimiter(1, Time())
    for number in range(CLIENTS_MAX + 50):
        limit.acquire(str(number))
    assert len(limit._buckets) == CLIENTS_MAX
    assert limit.acquire(str(CLIENTS_MAX + 49)) > 0
    assert limit.acquire("0") == 0


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "address 192.0.2.7"),
        ("127.0.0.1", "address 127.0.0.1"),
        ("::1", "address ::1"),
        ("::ffff:192.0.2.7", "address 192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "address 2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "address 2001:db8:1:2::/64"),
        ("fe80::1%eth0", "address fe80::/64"),
        (None, "address -"),
        ("", "address -"),
        ("somewhere", "address -"),
    ],
)
def test_a_client_is_named_by_its_address_or_its_network(address, name):
    assert client_key(address) == name
