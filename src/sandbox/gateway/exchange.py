"""A model request that was forwarded, and what its answer costs."""

import msgspec

from sandbox.gateway.asked import Asked
from sandbox.gateway.key_screen import KeyScreen
from sandbox.gateway.meter import Meter, meter_for
from sandbox.gateway.reports import Reports
from sandbox.model.event import Usage


class Exchange(msgspec.Struct):
    """`asked` is there where the answer may not go uncounted, `meter` once an answer has begun that is to be read."""

    is_metered: bool
    screen: KeyScreen
    asked: Asked | None = None
    is_answered: bool = False
    is_silent: bool = False
    meter: Meter | None = None

    def tell(self, reports: Reports, *, is_whole: bool, is_given_up: bool) -> Usage | None:
        """What it has cost, now that it is over.

        is_whole: the answer came to its end; is_given_up: it is we who do not listen any more.
        """
        bound = self._at_most(is_given_up=is_given_up)
        usage = bound or (None if self.meter is None else self.meter.usage())
        if usage is not None:
            reports.used(usage)
        if bound is not None:
            message = "An answer of the model ended before it told its usage; the most that it may be is counted."
            reports.trouble("usage_unread", message)
        elif usage is None and is_whole and self.meter is not None:
            reports.trouble("usage_unread", "An answer of the model told no usage; its tokens are not counted.")
        return usage

    def _at_most(self, *, is_given_up: bool) -> Usage | None:
        """None where the answer has told, refuses or may go uncounted, and where the upstream broke before it began."""
        asked, meter = self.asked, self.meter
        is_refused = self.is_answered and meter is None
        if asked is None or is_refused or (meter is not None and meter.has_told_all):
            return None
        has_begun = meter is not None and meter.has_begun
        if not (has_begun or is_given_up or self.is_silent):
            return None
        meter = meter or meter_for(b"text/event-stream" if asked.is_streamed else b"")
        return meter.at_most(asked, is_heard=not self.is_silent)
