"""Messages on stderr."""

import io

import pytest

from sandbox.cli.output.console import activity_line


@pytest.mark.parametrize(
    ("is_terminal", "term", "shown"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_activity_line_is_shown_on_a_terminal_and_erased(monkeypatch, is_terminal, term, shown):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", term)
    with activity_line("Checking…"):
        assert stderr.getvalue() == ("Checking…" if shown else "")
    assert stderr.getvalue() == ("Checking…\r\x1b[K" if shown else "")
