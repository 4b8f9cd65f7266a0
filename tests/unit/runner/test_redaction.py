"""Looking for secrets takes no longer than it may, whatever there is to look through."""

import pytest

from sandbox.runner.redaction import DeadlineRedactor
from sandbox.secrets.redactor import SecretRedactor

SECRET = b"s3cret-value-of-the-customer"
LARGE = [b"ordinary\n"] * 5


class Scene:
    """Each chunk takes a second to look through, and `wait_seconds` to come."""

    def __init__(self, wait_seconds=0.0):
        self.now, self.seen, self._wait_seconds = 100.0, [], wait_seconds
        self._redactor = SecretRedactor({"KEY": SECRET.decode()})

    def contains(self, chunks):
        return self._redactor.contains(self._looked_through(chunks))

    def _looked_through(self, chunks):
        for chunk in chunks:
            self.now += 1
            self.seen.append(chunk)
            yield chunk

    def coming(self, chunks):
        for chunk in chunks:
            self.now += self._wait_seconds
            yield chunk
        self.now += self._wait_seconds

    def timely(self, seconds):
        return DeadlineRedactor(self, seconds, lambda: self.now)


def test_what_there_is_time_for_is_looked_through():
    scene = Scene()
    timely = scene.timely(20)
    assert not timely.contains(LARGE)
    assert timely.contains([*LARGE, SECRET])


def test_what_is_not_seen_any_more_is_taken_for_a_secret():
    scene = Scene()
    assert scene.timely(3).contains(LARGE)
    assert len(scene.seen) == 3


def test_the_time_is_of_all_together():
    scene = Scene()
    timely = scene.timely(7)
    assert [timely.contains(chunks) for chunks in (LARGE, LARGE, LARGE, [])] == [False, True, True, False]
    assert len(scene.seen) == 7


def test_looking_that_ends_with_what_it_finds_counts_too():
    scene = Scene()
    timely = scene.timely(3)
    assert [timely.contains([SECRET, *LARGE]) for _ in range(9)] == [True] * 9
    assert len(scene.seen) == 3


def test_what_is_slow_to_come_takes_no_time_to_look_through():
    scene = Scene(wait_seconds=60)
    timely = scene.timely(20)
    assert [timely.contains(scene.coming(LARGE)) for _ in range(3)] == [False] * 3


def test_chunks_that_are_not_looked_at_are_left_to_who_has_them():
    """All of a file is told to git, also what was not looked through."""
    chunks = iter([b"1", b"2", b"3", b"4"])
    assert Scene().timely(1).contains(chunks)
    assert [*chunks] == [b"3", b"4"]


@pytest.mark.parametrize("seconds", [0, 1])
def test_all_else_is_as_ever(seconds):
    redactor = SecretRedactor({"KEY": SECRET.decode(), "PIN": "short"})
    timely = DeadlineRedactor(redactor, seconds, lambda: 0.0)
    assert timely.too_short_names == ("PIN",)
    assert timely.redact(SECRET) == b"[REDACTED:KEY]"
    assert timely.redact_text(SECRET.decode()) == "[REDACTED:KEY]"
    assert timely.redact_json([SECRET.decode()]) == ["[REDACTED:KEY]"]
    stream = timely.stream()
    assert stream.feed(SECRET) + stream.flush() == b"[REDACTED:KEY]"
