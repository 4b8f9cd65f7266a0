"""A session replaces a token for a limited time."""

from sandbox.api.authentication import SESSION_SECONDS, SESSIONS_MAX, SESSIONS_PER_TOKEN_MAX, SessionStore


class FakeTime:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_session_is_found_until_it_is_closed_or_expires():
    fake_time = FakeTime()
    sessions = SessionStore(fake_time)
    first, second = sessions.open("a"), sessions.open("b")
    assert (sessions.find(first), sessions.find(second)) == ("a", "b")
    sessions.close(first)
    sessions.close(first)
    assert sessions.find(first) is None
    fake_time.seconds = SESSION_SECONDS - 1
    assert sessions.find(second) == "b"
    fake_time.seconds = SESSION_SECONDS
    assert sessions.find(second) is None


def test_secret_has_256_random_bits():
    sessions = SessionStore(FakeTime())
    secrets = {sessions.open("a") for _ in range(10)}
    assert len(secrets) == 10
    assert {len(secret) for secret in secrets} == {43}  # base64 of 32 bytes


def test_unknown_secret_finds_no_session():
    sessions = SessionStore(FakeTime())
    sessions.open("a")
    for text in ("", "x", "\ud800", "é" * 500):
        assert sessions.find(text) is None


def test_number_of_sessions_is_bounded():
    sessions = SessionStore(FakeTime())
    secrets = [sessions.open(f"{number}") for number in range(SESSIONS_MAX + 1)]
    assert sessions.find(secrets[0]) is None
    assert sessions.find(secrets[1]) == "1"
    assert sessions.find(secrets[-1]) == f"{SESSIONS_MAX}"


def test_new_session_over_the_limit_per_token_closes_its_oldest_session():
    sessions = SessionStore(FakeTime())
    operators = sessions.open("operator")
    viewers = [sessions.open("viewer") for _ in range(SESSIONS_PER_TOKEN_MAX + 1)]
    assert sessions.find(operators) == "operator"
    assert sessions.find(viewers[0]) is None
    assert sessions.find(viewers[1]) == "viewer"
    assert sessions.find(viewers[-1]) == "viewer"
