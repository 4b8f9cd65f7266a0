"""The rate limit of one client does not affect others."""

import pytest

from sandbox.api.client_limits import RateLimiter, client_key


class FakeTime:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_request_allowance_is_limited_and_replenished():
    fake_time = FakeTime()
    limiter = RateLimiter(60, fake_time)
    assert [limiter.take_or_wait_seconds("a") for _ in range(60)] == [0] * 60
    assert limiter.take_or_wait_seconds("a") == 1
    assert limiter.take_or_wait_seconds("b") == 0
    fake_time.seconds += 1
    assert limiter.take_or_wait_seconds("a") == 0
    assert limiter.take_or_wait_seconds("a") == 1
    fake_time.seconds += 3600
    assert [limiter.take_or_wait_seconds("a") for _ in range(61)] == [0] * 60 + [1]


def test_request_over_a_small_limit_returns_the_seconds_to_wait():
    limiter = RateLimiter(2, FakeTime())
    assert [limiter.take_or_wait_seconds("a") for _ in range(3)] == [0, 0, 30]


def test_allowance_refills_evenly_within_a_minute():
    fake_time = FakeTime()
    limiter = RateLimiter(1, fake_time)
    assert [limiter.take_or_wait_seconds("a"), limiter.take_or_wait_seconds("a")] == [0, 60]
    fake_time.seconds += 59.5
    assert limiter.take_or_wait_seconds("a") == 1
    fake_time.seconds += 0.5
    assert limiter.take_or_wait_seconds("a") == 0


def test_zero_disables_the_limit():
    limiter = RateLimiter(0, FakeTime())
    assert {limiter.take_or_wait_seconds("a") for _ in range(1000)} == {0}


def test_number_of_tracked_clients_is_bounded():
    limiter = RateLimiter(1, FakeTime())
    for number in range(10_050):
        limiter.take_or_wait_seconds(str(number))
    assert len(limiter._buckets) == 10_000
    assert limiter.take_or_wait_seconds("10049") > 0
    assert limiter.take_or_wait_seconds("0") == 0


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "address 192.0.2.7"),
        ("127.0.0.1", "address 127.0.0.1"),
        ("::1", "address ::1"),
        ("::1%lo", "address ::1"),
        ("::ffff:192.0.2.7", "address 192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "address 2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "address 2001:db8:1:2::/64"),
        ("fe80::1%eth0", "address fe80::/64"),
        (None, "address -"),
        ("", "address -"),
        ("somewhere", "address -"),
    ],
)
def test_client_key_is_the_address_or_network(address, key):
    assert client_key(address) == key
