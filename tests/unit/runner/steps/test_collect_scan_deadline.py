"""The duration of a secret scan is limited for any input."""

import pytest

from sandbox.runner.steps.collect import DeadlineRedactor
from sandbox.secrets.redaction.redactor import SecretRedactor

SECRET = b"s3cret-value-of-the-customer"
ORDINARY_CHUNKS = [b"ordinary\n"] * 5


class TimedRedactor:
    """A redactor with a fake clock: scanning a chunk takes one second, and reading it takes `wait_seconds`."""

    def __init__(self, wait_seconds=0.0):
        self.now, self.scanned, self._wait_seconds = 100.0, [], wait_seconds
        self._redactor = SecretRedactor({"KEY": SECRET.decode()})

    def contains(self, chunks):
        return self._redactor.contains(self._scan(chunks))

    def _scan(self, chunks):
        for chunk in chunks:
            self.now += 1
            self.scanned.append(chunk)
            yield chunk

    def slowly(self, chunks):
        for chunk in chunks:
            self.now += self._wait_seconds
            yield chunk
        self.now += self._wait_seconds

    def with_deadline(self, seconds):
        return DeadlineRedactor(self, seconds, lambda: self.now)


def test_input_within_the_deadline_is_scanned():
    redactor = TimedRedactor()
    limited = redactor.with_deadline(20)
    assert not limited.contains(ORDINARY_CHUNKS)
    assert limited.contains([*ORDINARY_CHUNKS, SECRET])


def test_unscanned_input_is_treated_as_a_secret():
    redactor = TimedRedactor()
    assert redactor.with_deadline(3).contains(ORDINARY_CHUNKS)
    assert len(redactor.scanned) == 3


def test_deadline_covers_all_calls_together():
    redactor = TimedRedactor()
    limited = redactor.with_deadline(7)
    assert [limited.contains(chunks) for chunks in (ORDINARY_CHUNKS, ORDINARY_CHUNKS, ORDINARY_CHUNKS, [])] == [
        False,
        True,
        True,
        False,
    ]
    assert len(redactor.scanned) == 7


def test_scan_that_finds_a_secret_consumes_time():
    redactor = TimedRedactor()
    limited = redactor.with_deadline(3)
    assert [limited.contains([SECRET, *ORDINARY_CHUNKS]) for _ in range(9)] == [True] * 9
    assert len(redactor.scanned) == 3


def test_time_spent_waiting_for_input_is_not_counted():
    redactor = TimedRedactor(wait_seconds=60)
    limited = redactor.with_deadline(20)
    assert [limited.contains(redactor.slowly(ORDINARY_CHUNKS)) for _ in range(3)] == [False] * 3


def test_unscanned_chunks_are_not_consumed():
    """Git receives the whole file, including unscanned chunks."""
    chunks = iter([b"1", b"2", b"3", b"4"])
    assert TimedRedactor().with_deadline(1).contains(chunks)
    assert [*chunks] == [b"3", b"4"]


@pytest.mark.parametrize("seconds", [0, 1])
def test_methods_without_a_deadline_delegate_to_the_redactor(seconds):
    redactor = SecretRedactor({"KEY": SECRET.decode(), "PIN": "short"})
    limited = DeadlineRedactor(redactor, seconds, lambda: 0.0)
    assert limited.unsearchable_secret_names == ("PIN",)
    assert limited.redact(SECRET) == b"[REDACTED:KEY]"
    assert limited.redact_text(SECRET.decode()) == "[REDACTED:KEY]"
    assert limited.redact_json([SECRET.decode()]) == ["[REDACTED:KEY]"]
    stream = limited.stream()
    assert stream.feed(SECRET) + stream.flush() == b"[REDACTED:KEY]"
