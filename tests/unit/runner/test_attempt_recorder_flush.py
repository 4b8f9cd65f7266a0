"""A record that a flush may have missed is flushed again."""

from datetime import UTC, datetime

import pytest

from sandbox.model.events import ErrorReported, Event, Record, Transition
from sandbox.runner.attempt_recorder import RetryingWriter

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class FlushedWhileWriting:
    """A journal that another thread flushes just before a record is written. fails: whether writing then fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.last_seq = 0
        self.flush = lambda: None
        self._fails = fails

    def append(
        self, event: Event, transition: Transition | None = None, *, at: datetime, durable: bool = False
    ) -> Record:
        self.flush()
        if self._fails:
            raise OSError(28, "No space left on device")
        self.last_seq += 1
        return Record(self.last_seq, 0, at, event, transition)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_record_written_during_a_flush_needs_another_flush(fails: bool):
    journal = FlushedWhileWriting(fails=fails)
    writer = RetryingWriter(journal, lambda: False)
    journal.flush = writer.sync
    writer.append(ErrorReported("model_retry", "one"), at=NOW)
    assert writer.needs_sync
    writer.sync()
    assert not writer.needs_sync
