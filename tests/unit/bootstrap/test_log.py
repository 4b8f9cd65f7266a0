"""Lines of the log, for people and for programs: whole, honest, and with what they are about."""

import contextvars
import io
import json
import logging
import sys
from pathlib import Path

import pytest

from sandbox.bootstrap import log as wired_log
from sandbox.system.log_context import ATTEMPT_ID, REQUEST_ID, TASK_ID, TOKEN_ID, bind_task


@pytest.fixture
def log(monkeypatch):
    """Begin a log; gives a function for what was written, a line each. Everything is as before afterwards."""
    root, ours, written = logging.getLogger(), logging.getLogger("sandbox"), io.StringIO()
    handlers, levels = root.handlers[:], (root.level, ours.level)

    def begin(form="json", level="info"):
        monkeypatch.setattr(sys, "stderr", written)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        begin.lines = wired_log.configure_logging(form, level)
        return lambda: written.getvalue().splitlines()

    yield begin
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def about(work, **ids):
    """Do work that is about these, as a request or a runner does it."""

    def run():
        for variable in (REQUEST_ID, TOKEN_ID, TASK_ID, ATTEMPT_ID):
            variable.set(ids.get(variable.name))
        work()

    contextvars.Context().run(run)


def test_a_line_for_programs_says_when_who_what_and_about_what(log):
    written = log()
    about(lambda: logging.getLogger("sandbox.x").info("Hello %s", "you"), request_id="r", token_id="o", task_id="t")
    (line,) = map(json.loads, written())
    assert line.pop("time").endswith("Z")
    assert (line.pop("level"), line.pop("logger"), line.pop("message")) == ("info", "sandbox.x", "Hello you")
    assert line == {"request_id": "r", "token_id": "o", "task_id": "t"}


def test_a_line_for_people_has_the_same_behind_its_message(log):
    written = log("text")
    about(lambda: logging.getLogger("sandbox.x").warning("Hm", extra={"path": "a b", "status": 404}), attempt_id="a")
    time, _, rest = written()[0].partition(" ")
    assert time.endswith("Z")
    assert rest == 'WARNING Hm  path="a b" status=404 attempt_id=a'


def test_what_a_caller_says_of_a_task_wins_over_what_is_under_way(log):
    written = log()
    about(lambda: logging.getLogger("sandbox.x").info("x", extra={"task_id": "other"}), task_id="t")
    assert json.loads(written()[0])["task_id"] == "other"


def test_the_follower_of_a_task_no_longer_speaks_for_the_request_that_brought_it(log):
    written = log()

    def work():
        bind_task("t")
        logging.getLogger("sandbox.x").info("x")

    about(work, request_id="r", token_id="o")
    line = json.loads(written()[0])
    assert line["task_id"] == "t"
    assert not {"request_id", "token_id"} & line.keys()


@pytest.mark.parametrize("form", ["text", "json"])
def test_nobody_makes_up_a_line_by_choosing_a_name(log, form):
    written = log(form)
    forged = 'x\n2026-01-29T10:10:15.123Z ERROR forged\x1b[2J " = \u2028'
    about(lambda: logging.getLogger("sandbox.x").info("Path %s", forged, extra={"path": forged}), task_id=forged)
    (line,) = written()
    assert line.isascii() or line.isprintable()
    assert form == "text" or json.loads(line)["task_id"] == forged


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_belongs_to_its_line(log, form):
    written = log(form)
    try:
        raise ValueError("bug\nof two lines")
    except ValueError:
        logging.getLogger("sandbox.x").exception("It broke")
    first, *others = written()
    if form == "json":
        assert "ValueError: bug\nof two lines" in json.loads(first)["exception"]
        assert others == []
    else:
        assert first.endswith("ERROR   It broke")
        assert "    ValueError: bug" in others
        assert all(line.startswith("    ") for line in others)


def test_values_of_secrets_are_taken_out_of_everything(log):
    written = log()
    log.lines.redact = lambda text: text.replace("s3cr3t-value", "[redacted]")
    try:
        raise ValueError("s3cr3t-value")
    except ValueError:
        logging.getLogger("sandbox.x").exception("It is s3cr3t-value", extra={"path": "/s3cr3t-value"})
    assert "s3cr3t-value" not in written()[0]
    assert written()[0].count("[redacted]") >= 3


@pytest.mark.parametrize("form", ["text", "json"])
def test_values_of_secrets_are_taken_out_of_what_is_no_text_yet(log, form):
    written = log(form)
    log.lines.redact = lambda text: text.replace("s3cr3t-value", "[redacted]")
    told = {"error": OSError("s3cr3t-value"), "data_dir": Path("/s3cr3t-value"), "status": 200}
    logging.getLogger("sandbox.x").error("It broke", extra=told)
    (line,) = written()
    assert "s3cr3t-value" not in line
    assert form == "text" or json.loads(line)["status"] == 200


def test_less_is_written_where_less_is_asked_for(log):
    written = log(level="warning")
    logging.getLogger("sandbox.x").info("not this")
    logging.getLogger("sandbox.x").warning("but this")
    assert [json.loads(line)["message"] for line in written()] == ["but this"]


def test_libraries_are_heard_when_they_warn_and_not_before(log):
    written = log(level="debug")
    logging.getLogger("uvicorn.error").info("Started")
    logging.getLogger("uvicorn.error").error("Broken")
    logging.getLogger("sandbox.x").debug("ours")
    assert [json.loads(line)["message"] for line in written()] == ["Broken", "ours"]


def test_what_ends_the_process_is_a_line_as_well(log):
    written = log()
    sys.excepthook(ValueError, ValueError("bug"), None)
    line = json.loads(written()[0])
    assert (line["level"], line["message"]) == ("critical", "The process ends: ValueError")
    assert "ValueError: bug" in line["exception"]
