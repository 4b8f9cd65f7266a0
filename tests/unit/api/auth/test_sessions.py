"""A session stands for a token that was shown, for a time."""

from sandbox.api.auth.sessions import SESSION_SECONDS, SESSIONS_MAX, SESSIONS_PER_TOKEN_MAX, SessionStore


class Time:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_session_is_found_by_its_secret_until_it_is_closed_or_over():
    time = Time()
    sessions = SessionStore(time)
    first, second = sessions.open("a"), sessions.open("b")
    assert (sessions.find(first), sessions.find(second)) == ("a", "b")
    sessions.close(first)
    sessions.close(first)
    assert sessions.find(first) is None
    time.seconds = SESSION_SECONDS - 1
    assert sessions.find(second) == "b"
    time.seconds = SESSION_SECONDS
    assert sessions.find(second) is None


def test_what_is_no_secret_finds_nothing():
    sessions = SessionStore(Time())
    sessions.open("a")
    for text in ("", "x", "\ud800", "é" * 500):
        assert sessions.find(text) is None


def test_only_so_many_sessions_are_open():
    sessions = SessionStore(Time())
    secrets = [sessions.open(f"{number}") for number in range(SESSIONS_MAX + 1)]
    assert sessions.find(secrets[0]) is None
    assert sessions.find(secrets[1]) == "1"
    assert sessions.find(secrets[-1]) == f"{SESSIONS_MAX}"


def test_a_token_with_many_sessions_ends_its_own_oldest_and_nobody_elses():
    sessions = SessionStore(Time())
    operators = sessions.open("operator")
    viewers = [sessions.open("viewer") for _ in range(SESSIONS_PER_TOKEN_MAX + 1)]
    assert sessions.find(operators) == "operator"
    assert sessions.find(viewers[0]) is None
    assert sessions.find(viewers[1]) == "viewer"
    assert sessions.find(viewers[-1]) == "viewer"
