"""Figures for Prometheus."""

from fastapi import FastAPI
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.context import Asked
from sandbox.api.health import reasons_against
from sandbox.api.openapi import content, problems
from sandbox.api.server_metrics import CONTENT_TYPE


def add_metrics_route(app: FastAPI) -> None:
    """Put the route of this module on the app."""
    answer = content("The figures in Prometheus' text format", "text/plain")
    app.get(paths.METRICS, response_class=Response, responses={200: answer, **problems(503)})(read_metrics)


async def read_metrics(asked: Asked) -> Response:
    """How the server is, in figures for Prometheus."""
    health = await asked.tasks.health()
    is_ready = not reasons_against(health, asked)
    return Response(asked.metrics.text(health, is_ready=is_ready), headers={"content-type": CONTENT_TYPE})
