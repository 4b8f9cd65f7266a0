"""URL paths of the API."""

from typing import Annotated
from urllib.parse import quote

from fastapi import Path
from starlette.convertors import Convertor, register_url_convertor

ROOT = "/api/v1"
TASKS = f"{ROOT}/tasks"
STREAM = f"{TASKS}/stream"
TASK = f"{TASKS}/{{task_id}}"
WAIT = f"{TASK}/wait"
VM = f"{TASK}/vm"
DATA = f"{TASK}/data"
MANIFEST = f"{TASK}/manifest"
RERUN = f"{TASK}/rerun"
CONTINUE = f"{TASK}/continue"
TERMINAL = f"{TASK}/terminal"
LOGS = f"{TASK}/logs"
ARTIFACTS = f"{TASK}/artifacts"
ARTIFACT = f"{ARTIFACTS}/{{name:rest}}"
STATE_CHANGES = f"{ROOT}/events"
SESSION = f"{ROOT}/session"
HOSTS = f"{ROOT}/hosts"
HOST_DRAIN = f"{HOSTS}/{{host}}/drain"
DRAIN = f"{ROOT}/admin/drain"
PRUNE = f"{ROOT}/admin/prune"
BASIC_HEALTH = "/api/health"
HEALTH = f"{ROOT}/health"
READINESS = f"{HEALTH}/ready"
LIVENESS = f"{HEALTH}/live"
METRICS = "/metrics"
SCHEMA = "/openapi.json"
DOCS = "/docs"

SIGN_IN = "/sign-in"
ASSETS = "/assets/"

PUBLIC_PATHS = frozenset({BASIC_HEALTH, HEALTH, READINESS, LIVENESS})
"""Paths that need no token, for probes and load balancers."""

TaskId = Annotated[str, Path(description="The task's id")]
HostName = Annotated[str, Path(description="The host's name")]
ArtifactName = Annotated[str, Path(description="The artifact's name, or its path if no artifact has that name")]


class _AnyPathConvertor(Convertor[str]):
    """Matches the rest of the path. Starlette's `path` convertor stops at a newline, which a file name may contain."""

    regex = "[\\s\\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _AnyPathConvertor())


def is_public(path: str) -> bool:
    """Return whether the path is accessible without a token, as probes, the sign-in page and the assets are."""
    return path in PUBLIC_PATHS or path == SIGN_IN or path.startswith(ASSETS)


def is_page_asset(path: str) -> bool:
    """Return whether the path serves scripts, style sheets or images of the server's own pages."""
    return path.startswith((ASSETS, f"{DOCS}/"))


def task_path(task_id: str) -> str:
    """Return the path of a task."""
    return f"{TASKS}/{quote(task_id, safe='')}"


def task_page_path(task_id: str) -> str:
    """Return the path of a task's page in the dashboard."""
    return f"/tasks/{quote(task_id, safe='')}"


def artifact_path(task_id: str, name: str) -> str:
    """Return the path of an artifact's content."""
    return f"{task_path(task_id)}/artifacts/{quote(name, safe='')}"
