"""A sandbox cannot flood its task's journal through the gateway."""

from sandbox.gateway.event_reporter import EventReporter, printable_host
from sandbox.gateway.limits import (
    DENIALS_PER_SECOND_MAX,
    DENIALS_REPORTED_MAX,
    DROPPED_HEADERS_REPORTED_MAX,
    REDACTED_NAME_CHARACTERS_MAX,
    REPORTED_HOST_CHARACTERS_MAX,
    TROUBLE_INTERVAL_SECONDS,
)
from sandbox.model.events import EgressDenied, ErrorReported, Usage


class Watch:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened() -> tuple[EventReporter, list, Watch]:
    told: list = []
    watch = Watch()
    return EventReporter(told.append, watch), told, watch


def test_refusals_are_told_one_by_one_until_there_are_too_many_and_then_counted():
    reports, told, watch = opened()
    for number in range(DENIALS_PER_SECOND_MAX + 5):
        reports.report_denied(f"h{number}", 443, "no")
    assert told == [EgressDenied(f"h{number}", 443, "no") for number in range(DENIALS_PER_SECOND_MAX)]
    watch.now += 1
    reports.report_denied("later", 443, "no")
    assert isinstance(told[-2], ErrorReported)
    assert told[-2].error == "egress_denials_dropped"
    assert told[-2].message.startswith("5 more ")
    assert told[-1] == EgressDenied("later", 443, "no")
    assert reports.denial_count == DENIALS_PER_SECOND_MAX + 6


def test_the_count_is_told_at_the_end_when_nothing_is_refused_any_more():
    reports, told, _ = opened()
    for _ in range(DENIALS_PER_SECOND_MAX + 1):
        reports.report_denied("h", 443, "no")
    reports.flush()
    reports.flush()
    assert [type(one) for one in told[DENIALS_PER_SECOND_MAX:]] == [ErrorReported]


def test_of_refusals_without_end_only_the_number_grows():
    reports, told, watch = opened()
    for _ in range(DENIALS_REPORTED_MAX // DENIALS_PER_SECOND_MAX + 50):
        watch.now += 1
        for _ in range(DENIALS_PER_SECOND_MAX):
            reports.report_denied("h", 443, "no")
    reports.flush()
    assert len(told) == DENIALS_REPORTED_MAX + 1
    assert (told[-1].error, told[-1].message[:11]) == ("egress_denials_dropped", "Further ref")
    assert reports.denial_count == DENIALS_REPORTED_MAX + 50 * DENIALS_PER_SECOND_MAX


def test_the_same_trouble_is_told_once_and_again_only_after_a_while():
    reports, told, watch = opened()
    reports.report_trouble("upstream_unreachable", "first")
    reports.report_trouble("upstream_unreachable", "second")
    reports.report_trouble("gateway_error", "another kind")
    watch.now += TROUBLE_INTERVAL_SECONDS
    reports.report_trouble("upstream_unreachable", "third")
    assert [one.message for one in told] == ["first", "another kind", "third"]


def test_usage_is_never_left_out():
    reports, told, _ = opened()
    for _ in range(100):
        reports.report_usage(Usage("m", 1, 1))
    assert len(told) == 100


def test_a_secret_in_a_name_is_taken_out_while_the_name_is_whole():
    secret = "s3cr3t\r\n-" * 100
    told: list = []
    reports = EventReporter(told.append, Watch(), lambda text: text.replace(secret, "[REDACTED:TOKEN]"))
    reports.report_denied(f"a.{secret}.evil.example", 443, "no")
    reports.report_denied(f"{'x' * 200}{secret}", 443, "no")
    reports.report_denied("b.example", 443, "no")
    assert [one.host for one in told] == [
        "a.[REDACTED:TOKEN].evil.example",
        f"{'x' * 200}[REDACTED:TOKEN]",
        "b.example",
    ]


def test_a_name_that_is_too_long_to_be_redacted_is_not_told_at_all():
    """Cut before redaction it might end within a secret."""
    looked_at: list[str] = []

    def redact(text: str) -> str:
        looked_at.append(text)
        return text

    reports = EventReporter([].append, Watch(), redact)
    assert reports.sanitize("x" * REDACTED_NAME_CHARACTERS_MAX) == "x" * REPORTED_HOST_CHARACTERS_MAX
    assert reports.sanitize("x" * (REDACTED_NAME_CHARACTERS_MAX + 1)) == "(too-long)"
    assert len(looked_at) == 1


def test_a_host_is_told_as_visible_characters_and_not_for_ever():
    assert printable_host("xn--bcher-kva.example") == "xn--bcher-kva.example"
    assert printable_host("a b\r\n\x00é\x1b") == "a?b?????"
    assert printable_host("x" * 9999) == "x" * 255
    assert printable_host("") == "?"


def test_each_name_of_a_dropped_header_is_told_once_and_their_number_at_the_end():
    told: list = []
    reports = EventReporter(told.append, lambda: 0.0, lambda text: text.replace("s3cr3t", "[REDACTED]"))
    reports.report_dropped_headers([])
    assert told == []
    reports.report_dropped_headers([b"x-a", b"x-s3cr3t", b"x-a"])
    reports.report_dropped_headers([b"x-a"])
    message = "Headers of a model request were not forwarded: x-a, x-[REDACTED]."
    assert told == [ErrorReported("model_headers_dropped", message)]
    for number in range(1000):
        reports.report_dropped_headers([b"x-%d" % number])
    assert len(told) == DROPPED_HEADERS_REPORTED_MAX - 1
    reports.flush()
    assert told[-1] == ErrorReported(
        "model_headers_dropped", "1004 headers of model requests were not forwarded in total."
    )
    reports.flush()
    assert len(told) == DROPPED_HEADERS_REPORTED_MAX
