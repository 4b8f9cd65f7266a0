"""What the gateway tells the runner, kept to a rate that no sandbox can raise."""

from collections.abc import Callable

from sandbox.gateway.limits import (
    DENIALS_PER_SECOND_MAX,
    DENIALS_TOLD_MAX,
    DROPPED_HEADERS_TOLD_MAX,
    REDACTED_NAME_CHARACTERS_MAX,
    REPORTED_HOST_CHARACTERS_MAX,
    TROUBLE_SECONDS,
)
from sandbox.interfaces.gateway import BudgetReached, KeyRefused, Report
from sandbox.model.events import EgressDenied, Trouble, Usage


class Reports:
    """Passes on every usage, and denials and troubles as far as their rate and their number allow.

    monotonic: gives seconds; redact: takes the values of secrets out of a text.
    """

    def __init__(self, report: Report, monotonic: Callable[[], float], redact: Callable[[str], str] = str) -> None:
        self._report = report
        self._redact = redact
        self._monotonic = monotonic
        self._second_began = float("-inf")
        self._denials_in_second = 0
        self._denials_told = 0
        self.denials = 0
        self._troubles: dict[str, float] = {}
        self._headers_dropped = 0
        self._headers_told: set[bytes] = set()

    def shown(self, text: str) -> str:
        """A name from inside as it may stand in a journal: redacted while it is whole, then cut, or not told."""
        if len(text) > REDACTED_NAME_CHARACTERS_MAX:
            return "(too-long)"
        return printable(self._redact(text))

    def used(self, usage: Usage) -> None:
        """Tokens were spent."""
        self._report(usage)

    def budget_reached(self, message: str) -> None:
        """No further model request is forwarded."""
        self._report(BudgetReached(message))

    def key_refused(self, message: str) -> None:
        """The same, because the model does not take the server's key."""
        self._report(KeyRefused(message))

    def denied(self, host: str, port: int, reason: str) -> None:
        """Something was refused; `host` may come from inside."""
        self.denials += 1
        if self._denials_told == DENIALS_TOLD_MAX:
            return
        now = self._monotonic()
        if now - self._second_began >= 1.0:
            self._flush_denials()
            self._second_began = now
        self._denials_in_second += 1
        if self._denials_in_second > DENIALS_PER_SECOND_MAX:
            return
        self._report(EgressDenied(self.shown(host), port, reason))
        self._denials_told += 1
        if self._denials_told == DENIALS_TOLD_MAX:
            message = "Further refusals are counted, and not listed one by one."
            self._report(Trouble("egress_denials_dropped", message))

    def trouble(self, error: str, message: str) -> None:
        """Something went wrong; told at once, then for a while not again."""
        now = self._monotonic()
        if now - self._troubles.get(error, float("-inf")) >= TROUBLE_SECONDS:
            self._troubles[error] = now
            self._report(Trouble(error, message))

    def headers_dropped(self, names: list[bytes]) -> None:
        """Headers of a model request were not forwarded. Each name is reported once, up to DROPPED_HEADERS_TOLD_MAX."""
        self._headers_dropped += len(names)
        room = DROPPED_HEADERS_TOLD_MAX - len(self._headers_told)
        new = [name for name in dict.fromkeys(names) if name not in self._headers_told][:room]
        if new:
            self._headers_told.update(new)
            listed = ", ".join(self.shown(name.decode("latin-1")) for name in new)
            self._report(Trouble("model_headers_dropped", f"Headers of a model request were not forwarded: {listed}."))

    def flush(self) -> None:
        """At the end: report the refusals that were not reported one by one, and the number of dropped headers."""
        self._flush_denials()
        if self._headers_dropped:
            message = f"{self._headers_dropped} headers of model requests were not forwarded in total."
            self._headers_dropped = 0
            self._report(Trouble("model_headers_dropped", message))

    def _flush_denials(self) -> None:
        dropped = self._denials_in_second - DENIALS_PER_SECOND_MAX
        self._denials_in_second = 0
        if dropped > 0:
            message = f"{dropped} more refusals within one second are not listed one by one."
            self._report(Trouble("egress_denials_dropped", message))


def printable(host: str) -> str:
    """A host's name as it may stand in a journal: visible ASCII, not too long."""
    cut = host[:REPORTED_HOST_CHARACTERS_MAX]
    return "".join(character if "!" <= character <= "~" else "?" for character in cut) or "?"
