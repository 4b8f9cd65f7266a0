"""What a status is called."""

from http import HTTPStatus

_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Those of RFC 9110, which Python knows from 3.13 on only: answers and schema are the same with every version."""


def phrase(status: int) -> str:
    """Such as `Not Found`."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase
