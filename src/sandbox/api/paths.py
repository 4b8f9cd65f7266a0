"""The addresses of the API."""

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
TERMINAL = f"{TASK}/terminal"
LOGS = f"{TASK}/logs"
ARTIFACTS = f"{TASK}/artifacts"
ARTIFACT = f"{ARTIFACTS}/{{name:rest}}"
SESSION = f"{ROOT}/session"
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
"""Probes and balancers have no token."""

TaskId = Annotated[str, Path(description="The task's id")]


class _Rest(Convertor[str]):
    """Everything to the end. Starlette's own `path` stops at a newline, which a file's name may have."""

    regex = "[\\s\\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _Rest())


def is_public(path: str) -> bool:
    """Whether the address answers those who have no token too: probes, and the page on which people show theirs."""
    return path in PUBLIC_PATHS or path == SIGN_IN or path.startswith(ASSETS)


def is_page_asset(path: str) -> bool:
    """Whether there are scripts, styles and pictures of the server's own pages."""
    return path.startswith((ASSETS, f"{DOCS}/"))


def task_path(task_id: str) -> str:
    """Where the task is."""
    return f"{TASKS}/{quote(task_id, safe='')}"


def artifact_path(task_id: str, name: str) -> str:
    """Where the artifact's bytes are."""
    return f"{task_path(task_id)}/artifacts/{quote(name, safe='')}"
