"""Prints the schema of the API, as `openapi.json` in the repository has it."""

import asyncio
import json
import sys
from typing import cast

from sandbox import __version__
from sandbox.api.app import create_app
from sandbox.api.guard import Guard
from sandbox.api.settings import ApiSettings
from sandbox.contracts.access import Access
from sandbox.contracts.tasks import Tasks


def schema_text() -> str:
    """The schema as the server answers it, in a form whose changes are easy to read."""
    nobody = cast("Access", None)
    settings = ApiSettings(__version__, frozenset())
    app = create_app(
        cast("Tasks", None), settings=settings, shutting_down=asyncio.Event(), guard=Guard(nobody, settings)
    )
    return json.dumps(app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
