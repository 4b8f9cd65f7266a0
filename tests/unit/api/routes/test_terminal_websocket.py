"""Query parameters of a terminal."""

import pytest
from starlette.datastructures import QueryParams

from sandbox.api.routes.terminal_websocket import parse_open_terminal
from sandbox.interfaces.runner import OpenTerminal
from sandbox.model.errors import InvalidParameterError


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", OpenTerminal(24, 80)),
        ("rows=50&columns=132&term=screen.xterm-256color", OpenTerminal(50, 132, term="screen.xterm-256color")),
        ("of=agent", OpenTerminal(24, 80, is_agent_terminal=True)),
        ("of=agent&watch=true", OpenTerminal(24, 80, is_agent_terminal=True, is_read_only=True)),
    ],
)
def test_open_terminal_is_parsed(query: str, expected: OpenTerminal):
    assert parse_open_terminal(QueryParams(query)) == expected


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("of=host", "of"),
        ("of=shell&watch=true", "watch"),
        ("of=agent&watch=yes", "watch"),
        ("rows=0", "rows"),
        ("columns=1001", "columns"),
        ("rows=-1", "rows"),
        ("term=", "term"),
        ("term=x%0ay", "term"),
        ("term=../../evil", "term"),
        ("command=id", "command"),
    ],
)
def test_invalid_terminal_parameter_is_rejected(query: str, field: str):
    with pytest.raises(InvalidParameterError) as caught:
        parse_open_terminal(QueryParams(query))
    assert caught.value.errors[0].field == field


def test_all_invalid_terminal_parameters_are_listed():
    with pytest.raises(InvalidParameterError) as caught:
        parse_open_terminal(QueryParams("of=shel&row=1&columns=0&term=&columns=0"))
    assert [(error.location, error.suggestion) for error in caught.value.errors] == [
        ("query.row", "rows"),
        ("query.columns", None),
        ("query.of", "shell"),
        ("query.columns", None),
        ("query.term", None),
    ]
