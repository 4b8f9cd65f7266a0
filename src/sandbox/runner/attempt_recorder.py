"""What an attempt writes down, also while the disk has little room or none."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from sandbox.interfaces.disks import Reserve
from sandbox.interfaces.journal import JournalWriter, Recorder
from sandbox.model import events as e
from sandbox.model.limits import JOURNAL_WAIT_SECONDS, OUTPUT_SYNC_SECONDS
from sandbox.model.state_machine import Effect
from sandbox.model.task import Task
from sandbox.runner.retrying_writer import HostSpace, PatientWriter, can_be_left_out

_CUT = "Output is left out: the disk of the server's data directory has little room."
_log = logging.getLogger(__name__)


class AttemptRecorder:
    """Records what happens to the task of an attempt.

    Below the watermark output is left out, so that states never are; a `gap` tells it at once, another one how much.
    What the disk does not take waits in memory, in its order; the reserve is given back first.
    """

    def __init__(
        self,
        make_recorder: Callable[[JournalWriter], Recorder],
        writer: JournalWriter,
        space: HostSpace,
        reserve: Reserve,
    ) -> None:
        self.space = space
        self._writer = PatientWriter(writer, reserve.give_back)
        self._recorder = make_recorder(self._writer)
        self._reserve = reserve
        self._recorded_once: set[int] = set()
        """Hashes, for the paths in them may be long and there are thousands."""
        self._wants_reserve = self._lacks_reserve = False
        self._is_cut = False
        self._left_out_bytes = self._left_out_events = 0

    @property
    def task(self) -> Task:
        """The task as it stands now, what is not written yet included."""
        return self._recorder.task

    def tell_effects(self, take: Callable[[Effect], None]) -> None:
        """Let somebody carry effects out."""
        self._recorder.on_effect = take

    def record(self, event: e.Event) -> None:
        """Write an event, now or once the disk takes it.

        Raises IllegalEventError when it cannot happen now, OSError for a wish to cancel that cannot be written now,
        and for a record that is too long.
        """
        self._record(event)

    def _record(self, event: e.Event) -> bool:
        """Whether it was not left out."""
        if self._is_cut and (isinstance(event, e.AgentExited) or not self._is_held_up()):
            self._tell_left_out()
        if isinstance(event, e.Output) and (self._is_cut or self.space.is_short()):
            self._leave_out(event)
            return False
        try:
            self._recorder.record(event)
        except OSError:
            if not can_be_left_out(event):
                raise
            self._leave_out(event)
            return False
        return True

    def record_once(self, event: e.AttemptFailed | e.Trouble, about: str = "") -> None:
        """As `record`, unless this has recorded the same before: what is tried again finds the same again.

        about: what the event is about, where it does not say so itself.
        """
        key = hash((event, about))
        if key not in self._recorded_once and self._record(event):
            self._recorded_once.add(key)

    def take_reserve(self) -> None:
        """Keep room for the end, where there is any, until `spend_reserve`."""
        self._wants_reserve = True
        self._take_reserve()

    def spend_reserve(self) -> None:
        """The end has come: what was given back is not taken again, and what is there goes with the attempt's files."""
        self._wants_reserve = False

    def catch_up(self) -> None:
        """Write what waits. Raises OSError where the disk still does not take it."""
        self._writer.catch_up()
        if self._wants_reserve and not self._reserve.is_taken and not self.space.is_short():
            self._take_reserve()

    def sync(self) -> None:
        """Flush what is written to the disk; may have a thread of its own. Raises OSError."""
        self._writer.sync()

    async def settle(self) -> None:
        """Return once all is written, or after JOURNAL_WAIT_SECONDS, with an OSError then."""
        try:
            async with asyncio.timeout(JOURNAL_WAIT_SECONDS):
                while self._writer.has_kept:
                    with contextlib.suppress(OSError):
                        self._writer.catch_up()
                        return
                    await asyncio.sleep(OUTPUT_SYNC_SECONDS)
        except TimeoutError:
            raise OSError("The end of the task could not be written") from None

    def close(self) -> None:
        """Let go of the journal. Raises OSError."""
        self._writer.close()

    def _take_reserve(self) -> None:
        """Without it the task goes on all the same, and what it writes is flushed; why is told once."""
        try:
            self._reserve.take()
        except OSError as error:
            if not self._lacks_reserve:
                _log.warning("There is no room to keep for the end of the task: %s", error)
            self._lacks_reserve = True

    def _is_held_up(self) -> bool:
        return self._writer.has_kept or self.space.is_short()

    def _leave_out(self, event: e.Event) -> None:
        self._left_out_events += 1
        if isinstance(event, e.Output):
            self._left_out_bytes += len(event.data)
        if not self._is_cut:
            self._is_cut = True
            self._recorder.record(e.Gap(0, 0, _CUT))

    def _tell_left_out(self) -> None:
        left_out = f"{self._left_out_bytes} bytes of output in {self._left_out_events} pieces were left out"
        self._is_cut, self._left_out_bytes, self._left_out_events = False, 0, 0
        self._recorder.record(e.Gap(0, 0, f"{left_out}: the disk of the server's data directory had little room."))
