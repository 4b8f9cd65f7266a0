"""The schema of the API as a file: `openapi.json` in the repository, which script/reference writes."""

import json

from sandbox import __version__
from sandbox.api.app import describe_api


def schema_text() -> str:
    """The schema as the server answers it, in a form whose changes are easy to read."""
    schema = describe_api(__version__).openapi()
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
