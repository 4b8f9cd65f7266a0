"""Applies the events of a task to its state, and appends them to its journal."""

from collections.abc import Callable
from datetime import datetime

from sandbox.interfaces.journal import JournalWriter
from sandbox.model import events as e
from sandbox.model.events import Event, Record
from sandbox.model.state_machine import Effect, IllegalEventError, advance
from sandbox.model.task import Task

_DURABLE_EVENTS = (
    *(e.AttemptStarted, e.AgentStarted, e.AgentExited, e.AttemptFailed, e.AttemptTornDown, e.FollowUpSkipped),
    *(e.CancelRequested, e.ArtifactCollected, e.Usage),
)
"""Events that are flushed before `record` returns, although they do not change the state."""


class JournalRecorder:
    """Records the events of one task. Implements `Recorder`. The arguments are those of `Journals.recorder`."""

    def __init__(
        self,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        *,
        on_effect: Callable[[Effect], None] = lambda _: None,
        transform: Callable[[Event], Event] = lambda event: event,
    ) -> None:
        self.writer = writer
        self._on_effect = on_effect
        self._transform = transform
        self._task = task
        self._now = now

    @property
    def task(self) -> Task:
        """The current task."""
        if self._task is None:
            raise IllegalEventError("The journal has no record yet.")
        return self._task

    def record(self, event: Event) -> Record:
        """Write one event, after `transform`; see `Recorder.record`."""
        event, at = self._transform(event), self._now()
        result = advance(self._task, event, seq=self.writer.last_seq + 1, at=at)
        durable = result.transition is not None or isinstance(event, _DURABLE_EVENTS)
        record = self.writer.append(event, result.transition, at=at, durable=durable)
        self._task = result.task
        for effect in result.effects:
            self._on_effect(effect)
        return record
