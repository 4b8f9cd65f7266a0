"""Log lines in text and JSON: complete, escaped, redacted, with context fields."""

import contextvars
import io
import json
import logging
import sys
from pathlib import Path

import pytest

from sandbox.bootstrap import log as wired_log
from sandbox.primitives.log_context import ATTEMPT_ID, REQUEST_ID, TASK_ID, TOKEN_ID, bind_task


@pytest.fixture
def configure_log(monkeypatch):
    """Return a function that configures logging and returns a reader of the lines. Restore logging afterwards."""
    root, package_logger, stream = logging.getLogger(), logging.getLogger("sandbox"), io.StringIO()
    handlers, levels = root.handlers[:], (root.level, package_logger.level)

    def configure(form="json", level="info", redact=str):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        wired_log.configure_logging(form, level, redact)
        return lambda: stream.getvalue().splitlines()

    yield configure
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package_logger.setLevel(levels[1])


def run_with_context(work, **ids):
    """Run `work` with these ids in the log context."""

    def run():
        for variable in (REQUEST_ID, TOKEN_ID, TASK_ID, ATTEMPT_ID):
            variable.set(ids.get(variable.name))
        work()

    contextvars.Context().run(run)


def test_json_line_has_all_fields_of_its_record(configure_log):
    read_lines = configure_log()
    run_with_context(
        lambda: logging.getLogger("sandbox.x").info("Hello %s", "you"), request_id="r", token_id="o", task_id="t"
    )
    (line,) = map(json.loads, read_lines())
    assert line.pop("time").endswith("Z")
    assert (line.pop("level"), line.pop("logger"), line.pop("message")) == ("info", "sandbox.x", "Hello you")
    assert line == {"request_id": "r", "token_id": "o", "task_id": "t"}


def test_text_line_appends_fields_to_the_message(configure_log):
    read_lines = configure_log("text")
    run_with_context(
        lambda: logging.getLogger("sandbox.x").warning("Hm", extra={"path": "a b", "status": 404}), attempt_id="a"
    )
    time, _, rest = read_lines()[0].partition(" ")
    assert time.endswith("Z")
    assert rest == 'WARNING Hm  path="a b" status=404 attempt_id=a'


def test_explicit_task_id_overrides_the_context(configure_log):
    read_lines = configure_log()
    run_with_context(lambda: logging.getLogger("sandbox.x").info("x", extra={"task_id": "other"}), task_id="t")
    assert json.loads(read_lines()[0])["task_id"] == "other"


def test_binding_a_task_clears_request_ids(configure_log):
    read_lines = configure_log()

    def work():
        bind_task("t")
        logging.getLogger("sandbox.x").info("x")

    run_with_context(work, request_id="r", token_id="o")
    line = json.loads(read_lines()[0])
    assert line["task_id"] == "t"
    assert not {"request_id", "token_id"} & line.keys()


@pytest.mark.parametrize("form", ["text", "json"])
def test_forged_line_breaks_are_escaped(configure_log, form):
    read_lines = configure_log(form)
    forged = 'x\n2026-01-29T10:10:15.123Z ERROR forged\x1b[2J " = \u2028'
    run_with_context(
        lambda: logging.getLogger("sandbox.x").info("Path %s", forged, extra={"path": forged}), task_id=forged
    )
    (line,) = read_lines()
    assert line.isascii() or line.isprintable()
    assert form == "text" or json.loads(line)["task_id"] == forged


@pytest.mark.parametrize("form", ["text", "json"])
def test_traceback_is_attached_to_its_record(configure_log, form):
    read_lines = configure_log(form)
    try:
        raise ValueError("bug\nof two lines")
    except ValueError:
        logging.getLogger("sandbox.x").exception("It broke")
    first, *others = read_lines()
    if form == "json":
        assert "ValueError: bug\nof two lines" in json.loads(first)["exception"]
        assert others == []
    else:
        assert first.endswith("ERROR   It broke")
        assert "    ValueError: bug" in others
        assert all(line.startswith("    ") for line in others)


def redact(text):
    return text.replace("s3cr3t-value", "[redacted]")


def test_secret_values_are_redacted_in_all_fields(configure_log):
    read_lines = configure_log(redact=redact)
    try:
        raise ValueError("s3cr3t-value")
    except ValueError:
        logging.getLogger("sandbox.x").exception("It is s3cr3t-value", extra={"path": "/s3cr3t-value"})
    assert "s3cr3t-value" not in read_lines()[0]
    assert read_lines()[0].count("[redacted]") >= 3


@pytest.mark.parametrize("form", ["text", "json"])
def test_secret_values_are_redacted_in_objects(configure_log, form):
    read_lines = configure_log(form, redact=redact)
    extra = {"error": OSError("s3cr3t-value"), "data_dir": Path("/s3cr3t-value"), "status": 200}
    logging.getLogger("sandbox.x").error("It broke", extra=extra)
    (line,) = read_lines()
    assert "s3cr3t-value" not in line
    assert form == "text" or json.loads(line)["status"] == 200


def test_level_filters_records(configure_log):
    read_lines = configure_log(level="warning")
    logging.getLogger("sandbox.x").info("not this")
    logging.getLogger("sandbox.x").warning("but this")
    assert [json.loads(line)["message"] for line in read_lines()] == ["but this"]


def test_libraries_log_at_warning_and_above(configure_log):
    read_lines = configure_log(level="debug")
    logging.getLogger("uvicorn.error").info("Started")
    logging.getLogger("uvicorn.error").error("Broken")
    logging.getLogger("sandbox.x").debug("ours")
    assert [json.loads(line)["message"] for line in read_lines()] == ["Broken", "ours"]


def test_uncaught_exception_is_logged(configure_log):
    read_lines = configure_log()
    sys.excepthook(ValueError, ValueError("bug"), None)
    line = json.loads(read_lines()[0])
    assert (line["level"], line["message"]) == ("critical", "The process exits after an uncaught exception: ValueError")
    assert "ValueError: bug" in line["exception"]
