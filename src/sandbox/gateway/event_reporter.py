"""Reports events from the gateway to the runner. A sandbox can cause denials and errors, so their rate is limited."""

import re
from collections.abc import Callable

from sandbox.gateway.limits import (
    DENIALS_REPORTED_MAX,
    DROPPED_HEADERS_REPORTED_MAX,
    ERROR_REPORT_INTERVAL_SECONDS,
    QUOTE_CHARACTERS_MAX,
    REDACTED_NAME_CHARACTERS_MAX,
    REPORTED_DENIALS_PER_SECOND_MAX,
    REPORTED_HOST_CHARACTERS_MAX,
)
from sandbox.interfaces.gateway import BudgetExhausted, KeyRejected, ReportEvent
from sandbox.model.display_text import escape_character, replace_unprintable
from sandbox.model.events import EgressDenied, ErrorReported, Usage


class EventReporter:
    """Reports all usage, but limits the rate of reported errors, and the rate and number of reported denials.

    monotonic: returns seconds.
    redact: removes the values of secrets from text.
    """

    def __init__(self, report: ReportEvent, monotonic: Callable[[], float], redact: Callable[[str], str] = str) -> None:
        self._report = report
        self._redact = redact
        self._monotonic = monotonic
        self._second_started = float("-inf")
        self._denials_in_second = 0
        self._denials_reported = 0
        self.denied_count = 0
        self._error_times: dict[str, float] = {}
        self._dropped_headers = 0
        self._reported_headers: set[bytes] = set()

    def sanitize(self, text: str) -> str:
        """Make a name from the sandbox safe for the journal: redact the full name, then truncate it.

        A name longer than REDACTED_NAME_CHARACTERS_MAX is replaced by a fixed text.
        """
        return _sanitize(text, self._redact)

    def _redact_host(self, host: str) -> str:
        """Redact a host name and convert it to lower case: a program may write a secret's value in another case.

        The name is redacted before and after each conversion, because a conversion can change a value.
        """
        redacted = self._redact(_decode_escapes(self._redact(host)))
        name = self._redact(redacted.lower())
        for placeholder in _PLACEHOLDER.findall(redacted):
            name = name.replace(placeholder.lower(), placeholder)
        return name

    def quote(self, text: str) -> str:
        """Make a message from the upstream safe for a report: redact it, escape it as one line, then truncate it."""
        line = replace_unprintable(" ".join(self._redact(text).split()), escape_character)
        return line if len(line) <= QUOTE_CHARACTERS_MAX else f"{line[:QUOTE_CHARACTERS_MAX]}…"

    def report_usage(self, usage: Usage) -> None:
        """Report the usage of a model request."""
        self._report(usage)

    def report_budget_exhausted(self, message: str) -> None:
        """Report that the budget is spent and that no more model requests are forwarded."""
        self._report(BudgetExhausted(message))

    def report_key_rejected(self, message: str) -> None:
        """Report that the model rejected the server's key and that no more model requests are forwarded."""
        self._report(KeyRejected(message))

    def report_denied(self, host: str, port: int, reason: str) -> None:
        """Report a denied connection or request. `host` may be untrusted."""
        self.denied_count += 1
        if self._denials_reported == DENIALS_REPORTED_MAX:
            return
        now = self._monotonic()
        if now - self._second_started >= 1.0:
            self._flush_denials()
            self._second_started = now
        self._denials_in_second += 1
        if self._denials_in_second > REPORTED_DENIALS_PER_SECOND_MAX:
            return
        self._report(EgressDenied(_sanitize(host, self._redact_host), port, reason))
        self._denials_reported += 1
        if self._denials_reported == DENIALS_REPORTED_MAX:
            message = "Further denied connections are counted but not listed."
            self._report(ErrorReported("egress_denials_dropped", message))

    def report_error(self, error: str, message: str) -> None:
        """Report an error, at most once per ERROR_REPORT_INTERVAL_SECONDS for each kind."""
        now = self._monotonic()
        if now - self._error_times.get(error, float("-inf")) >= ERROR_REPORT_INTERVAL_SECONDS:
            self._error_times[error] = now
            self._report(ErrorReported(error, message))

    def report_dropped_headers(self, names: list[bytes]) -> None:
        """Report the headers that were not forwarded with a model request.

        Each name is reported once, up to DROPPED_HEADERS_REPORTED_MAX names.
        """
        self._dropped_headers += len(names)
        names_left = DROPPED_HEADERS_REPORTED_MAX - len(self._reported_headers)
        new = [name for name in dict.fromkeys(names) if name not in self._reported_headers][:names_left]
        if new:
            self._reported_headers.update(new)
            listed = ", ".join(self.sanitize(name.decode("latin-1")) for name in new)
            self._report(
                ErrorReported("model_headers_dropped", f"Headers of a model request were not forwarded: {listed}.")
            )

    def flush(self) -> None:
        """Report the numbers of unlisted denials and of dropped headers. Call this when the gateway stops."""
        self._flush_denials()
        if self._dropped_headers:
            message = f"In total, {self._dropped_headers} headers of model requests were not forwarded."
            self._dropped_headers = 0
            self._report(ErrorReported("model_headers_dropped", message))

    def _flush_denials(self) -> None:
        dropped = self._denials_in_second - REPORTED_DENIALS_PER_SECOND_MAX
        self._denials_in_second = 0
        if dropped > 0:
            message = f"{dropped} more denied connections within one second are not listed."
            self._report(ErrorReported("egress_denials_dropped", message))


def _sanitize(text: str, redact: Callable[[str], str]) -> str:
    return "(too-long)" if len(text) > REDACTED_NAME_CHARACTERS_MAX else printable_host(redact(text))


_PLACEHOLDER = re.compile(r"\[REDACTED:\w+\]")
_ESCAPED_BYTES = re.compile(r"(?:\\x[89a-f][0-9a-f])+")
_FIRST_SURROGATE = 0xDC00
"""With the error handler `surrogateescape`, an invalid byte is decoded as this code point plus the byte."""

_INVALID_BYTES = {_FIRST_SURROGATE + byte: byte for byte in range(0x80, 0x100)}


def _decode_escapes(host: str) -> str:
    """Decode the escapes of bytes that are not ASCII, as UTF-8. Only text can be converted to lower case."""
    return _ESCAPED_BYTES.sub(lambda match: _decode_bytes(bytes.fromhex(match[0].replace("\\x", ""))), host)


def _decode_bytes(data: bytes) -> str:
    """Decode UTF-8. Decode each invalid byte as Latin-1."""
    return data.decode(errors="surrogateescape").translate(_INVALID_BYTES)


def printable_host(host: str) -> str:
    """Make a host name safe for the journal: printable ASCII, limited in length."""
    cut = host[:REPORTED_HOST_CHARACTERS_MAX]
    return "".join(character if "!" <= character <= "~" else "?" for character in cut) or "?"
