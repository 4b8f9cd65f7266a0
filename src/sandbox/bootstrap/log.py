"""Logging of servers and runners: text or JSON lines with the context of each message.

Uses the standard library's `logging`, which asyncio imports in every process anyway.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from sandbox.model.display_text import escape_character, replace_unprintable
from sandbox.primitives.log_context import ATTEMPT_ID, REQUEST_ID, TASK_ID, TOKEN_ID

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

FORMAT_VARIABLE, LEVEL_VARIABLE = "SANDBOX_LOG_FORMAT", "SANDBOX_LOG_LEVEL"
"""Variables that pass the server's log settings to its runners and workers."""

_CONTEXT_FIELDS = {"task_id": TASK_ID, "attempt_id": ATTEMPT_ID, "request_id": REQUEST_ID, "token_id": TOKEN_ID}
_EXTRA_FIELDS = (
    "state",
    "error",
    "method",
    "path",
    "status",
    "duration_ms",
    "client",
    "pid",
    "http",
    "ws",
    "data_dir",
    "kind",
)
"""Additional fields of a line, passed as `extra` in the log call."""


def configure_logging(log_format: str, level: str, redact: Callable[[str], str] = str) -> None:
    """Log messages at `level` or above, and warnings and errors from libraries, to stderr. Can be called repeatedly.

    redact: removes secret values from any string.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(_render_json if log_format == "json" else _render_text, redact))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sandbox").setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught_exception


class LogFormatter(logging.Formatter):
    """Formats log records. redact: removes secret values from any string."""

    def __init__(self, render: Callable[[Mapping[str, Any]], str], redact: Callable[[str], str]) -> None:
        super().__init__()
        self._redact = redact
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        """Format one line. In text format, a traceback follows on additional lines."""
        fields = {name: value for name, value in self._collect_fields(record).items() if value is not None}
        return self._render(
            {
                name: value if isinstance(value, int | float) else self._redact(str(value))
                for name, value in fields.items()
            }
        )

    def _collect_fields(self, record: logging.LogRecord) -> dict[str, Any]:
        at = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: getattr(record, name, None) for name in _EXTRA_FIELDS}
        fields |= {name: getattr(record, name, None) or subject.get() for name, subject in _CONTEXT_FIELDS.items()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


def _render_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields)


def _render_text(fields: Mapping[str, Any]) -> str:
    rest = dict(fields)
    message = replace_unprintable(rest.pop("message"), escape_character)
    head = f"{rest.pop('time')} {rest.pop('level').upper():<7} {message}"
    del rest["logger"]
    exception = rest.pop("exception", "")
    line = "  ".join([head, " ".join(f"{name}={_quote_value(value)}" for name, value in rest.items())]).rstrip()
    # Escape everything: a name or path chosen by an attacker must not forge log lines.
    return "\n    ".join([line, *(replace_unprintable(below, escape_character) for below in exception.splitlines())])


def _quote_value(value: Any) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


def _log_uncaught_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    message = "The process exits after an uncaught exception: %s"
    logging.getLogger("sandbox").critical(message, kind.__name__, exc_info=(kind, error, trace))
