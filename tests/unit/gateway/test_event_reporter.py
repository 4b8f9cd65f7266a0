"""A sandbox cannot flood its task's journal through the gateway."""

import pytest

from sandbox.gateway.event_reporter import EventReporter, printable_host
from sandbox.gateway.limits import (
    DENIALS_REPORTED_MAX,
    DROPPED_HEADERS_REPORTED_MAX,
    ERROR_REPORT_INTERVAL_SECONDS,
    REDACTED_NAME_CHARACTERS_MAX,
    REPORTED_DENIALS_PER_SECOND_MAX,
    REPORTED_HOST_CHARACTERS_MAX,
)
from sandbox.model.events import EgressDenied, ErrorReported, Usage
from sandbox.secrets.redaction.redactor import SecretRedactor


class FakeClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def create_reporter() -> tuple[EventReporter, list, FakeClock]:
    events: list = []
    clock = FakeClock()
    return EventReporter(events.append, clock), events, clock


def test_denials_over_the_rate_are_counted_instead_of_reported():
    reporter, events, clock = create_reporter()
    for number in range(REPORTED_DENIALS_PER_SECOND_MAX + 5):
        reporter.report_denied(f"h{number}", 443, "no")
    assert events == [EgressDenied(f"h{number}", 443, "no") for number in range(REPORTED_DENIALS_PER_SECOND_MAX)]
    clock.now += 1
    reporter.report_denied("later", 443, "no")
    assert isinstance(events[-2], ErrorReported)
    assert events[-2].error == "egress_denials_dropped"
    assert events[-2].message.startswith("5 more ")
    assert events[-1] == EgressDenied("later", 443, "no")
    assert reporter.denied_count == REPORTED_DENIALS_PER_SECOND_MAX + 6


@pytest.mark.parametrize("host", ["Value-X1.example", "value-x1.example", "VALUE-X1.EXAMPLE", "vAlUe-x1.eXample"])
def test_value_in_a_host_name_is_redacted_regardless_of_case(host):
    events: list = []
    redactor = SecretRedactor({"S": "Value-X1"})
    reporter = EventReporter(events.append, FakeClock(), redactor.redact_text)
    reporter.report_denied(host, 443, "no")
    reporter.report_denied("Other.example", 443, "no")
    assert [event.host for event in events] == ["[REDACTED:S].example", "other.example"]


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("ägeheimnis1", "\\xff\\xc3\\xa4geheimnis1.example"),
        ("Äpfelbaum7", "\\xe9\\xc3\\x84pfelbaum7.example"),
        ("Äpfelbaum7", "\\xc3\\xa4PFELBAUM7.example"),
        ("Hunter2-ΚΩΣ", "Hunter2-\\xce\\x9a\\xce\\xa9\\xce\\xa3.example"),
        ("Hunter2-ΚΩΣ", "Hunter2-\\xce\\x9a\\xce\\xa9\\xce\\xa3x.example"),
        ("pass\\x41word9", "pass\\x41word9.example"),
        ("pass\\xc3word9", "pass\\xc3word9.example"),
    ],
)
def test_value_with_characters_that_are_not_ascii_is_redacted_in_a_host_name(value, host):
    events: list = []
    redactor = SecretRedactor({"S": value})
    EventReporter(events.append, FakeClock(), redactor.redact_text).report_denied(host, 443, "no")
    assert "[REDACTED:S]" in events[0].host
    assert not any(part in events[0].host.lower() for part in ("geheimnis", "pfelbaum", "hunter", "word9"))


def test_two_values_in_different_case_are_redacted_in_a_host_name():
    events: list = []
    redactor = SecretRedactor({"S": "Hunter2-ΚΩΣ", "T": "Value-X1"})
    reporter = EventReporter(events.append, FakeClock(), redactor.redact_text)
    reporter.report_denied("Hunter2-\\xce\\x9a\\xce\\xa9\\xce\\xa3.VALUE-X1.Example", 443, "no")
    reporter.report_denied("[REDACTED:VALUE-X1].Example", 443, "no")
    reporter.report_denied("x" * (REDACTED_NAME_CHARACTERS_MAX + 1), 443, "no")
    hosts = [event.host for event in events]
    assert hosts == ["[REDACTED:S].[REDACTED:T].example", "[redacted:[REDACTED:T]].example", "(too-long)"]


def test_flush_reports_the_count_of_dropped_denials():
    reporter, events, _ = create_reporter()
    for _ in range(REPORTED_DENIALS_PER_SECOND_MAX + 1):
        reporter.report_denied("h", 443, "no")
    reporter.flush()
    reporter.flush()
    assert [type(event) for event in events[REPORTED_DENIALS_PER_SECOND_MAX:]] == [ErrorReported]


def test_total_number_of_reported_denials_is_limited():
    reporter, events, clock = create_reporter()
    for _ in range(DENIALS_REPORTED_MAX // REPORTED_DENIALS_PER_SECOND_MAX + 50):
        clock.now += 1
        for _ in range(REPORTED_DENIALS_PER_SECOND_MAX):
            reporter.report_denied("h", 443, "no")
    reporter.flush()
    assert len(events) == DENIALS_REPORTED_MAX + 1
    assert (events[-1].error, events[-1].message[:11]) == ("egress_denials_dropped", "Further den")
    assert reporter.denied_count == DENIALS_REPORTED_MAX + 50 * REPORTED_DENIALS_PER_SECOND_MAX


def test_repeated_error_is_reported_once_per_interval():
    reporter, events, clock = create_reporter()
    reporter.report_error("upstream_unreachable", "first")
    reporter.report_error("upstream_unreachable", "second")
    reporter.report_error("gateway_error", "another kind")
    clock.now += ERROR_REPORT_INTERVAL_SECONDS
    reporter.report_error("upstream_unreachable", "third")
    assert [event.message for event in events] == ["first", "another kind", "third"]


def test_usage_is_always_reported():
    reporter, events, _ = create_reporter()
    for _ in range(100):
        reporter.report_usage(Usage("m", 1, 1))
    assert len(events) == 100


def test_secret_in_a_host_is_redacted_before_truncation():
    secret = "s3cr3t\r\n-" * 100
    events: list = []
    reporter = EventReporter(events.append, FakeClock(), lambda text: text.replace(secret, "[REDACTED:TOKEN]"))
    reporter.report_denied(f"a.{secret}.evil.example", 443, "no")
    reporter.report_denied(f"{'x' * 200}{secret}", 443, "no")
    reporter.report_denied("b.example", 443, "no")
    assert [event.host for event in events] == [
        "a.[REDACTED:TOKEN].evil.example",
        f"{'x' * 200}[REDACTED:TOKEN]",
        "b.example",
    ]


def test_name_too_long_for_redaction_is_replaced():
    """Truncation before redaction could split a secret."""
    redacted: list[str] = []

    def redact(text: str) -> str:
        redacted.append(text)
        return text

    reporter = EventReporter([].append, FakeClock(), redact)
    assert reporter.sanitize("x" * REDACTED_NAME_CHARACTERS_MAX) == "x" * REPORTED_HOST_CHARACTERS_MAX
    assert reporter.sanitize("x" * (REDACTED_NAME_CHARACTERS_MAX + 1)) == "(too-long)"
    assert len(redacted) == 1


def test_printable_host_is_escaped_and_truncated():
    assert printable_host("xn--bcher-kva.example") == "xn--bcher-kva.example"
    assert printable_host("a b\r\n\x00é\x1b") == "a?b?????"
    assert printable_host("x" * 9999) == "x" * 255
    assert printable_host("") == "?"


def test_dropped_header_names_are_reported_once_with_a_final_count():
    events: list = []
    reporter = EventReporter(events.append, lambda: 0.0, lambda text: text.replace("s3cr3t", "[REDACTED]"))
    reporter.report_dropped_headers([])
    assert events == []
    reporter.report_dropped_headers([b"x-a", b"x-s3cr3t", b"x-a"])
    reporter.report_dropped_headers([b"x-a"])
    message = "Headers of a model request were not forwarded: x-a, x-[REDACTED]."
    assert events == [ErrorReported("model_headers_dropped", message)]
    for number in range(1000):
        reporter.report_dropped_headers([b"x-%d" % number])
    assert len(events) == DROPPED_HEADERS_REPORTED_MAX - 1
    reporter.flush()
    assert events[-1] == ErrorReported(
        "model_headers_dropped", "In total, 1004 headers of model requests were not forwarded."
    )
    reporter.flush()
    assert len(events) == DROPPED_HEADERS_REPORTED_MAX
