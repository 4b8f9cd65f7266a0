"""Pages with forms: sign in, submit a manifest."""

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.middleware.authentication import get_caller
from sandbox.dashboard.templates import render_page
from sandbox.interfaces.agent import Agent
from sandbox.model.manifest.yaml import manifest_yaml
from sandbox.model.task import Task
from sandbox.system import client_fairness


async def show_sign_in(request: Request, _: AppContext) -> Response:
    """Render the sign-in form; its script opens the session."""
    return render_page(request, "sign_in", back=safe_redirect_path(request.query_params.get("to", "/")))


def safe_redirect_path(target: str) -> str:
    """Return `target` if it is a path on this server, else `/`."""
    is_local_path = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if is_local_path else "/"


async def show_submit(request: Request, context: AppContext) -> Response:
    """Render the manifest editor with a template, or with the manifest of the task to run again."""
    again = request.query_params.get("from")
    async with client_fairness.thread_slot():
        task = await context.services.tasks.status(again) if again else None
        return await client_fairness.to_thread(_render_submit, request, task, context.settings.agents)


def _render_submit(request: Request, task: Task | None, agents: Mapping[str, Agent]) -> Response:
    templates = [template for agent in agents.values() for template in agent.manifest_templates]
    sees_all = get_caller(request).is_operator
    text = manifest_yaml(task.manifest, agents, with_sources=sees_all) if task else templates[0].text
    return render_page(request, "submit", patterns=templates, text=text, again=task)
