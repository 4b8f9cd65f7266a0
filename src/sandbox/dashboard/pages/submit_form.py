"""The page with the form that submits a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.authentication import get_caller
from sandbox.dashboard.failure_notice import describe_failure, field_words
from sandbox.dashboard.templates import render_page
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.store import TaskQuery
from sandbox.model.failure import FailureCode
from sandbox.model.manifest.field_formats import ALLOWED_HOST
from sandbox.model.manifest.overrides import parse_override
from sandbox.model.manifest.schema import Lifecycle, Manifest, Vm
from sandbox.model.manifest.yaml import manifest_yaml, write_yaml
from sandbox.model.repository_urls import public_repository_url, short_repository
from sandbox.model.task import Task
from sandbox.model.wire.task_bodies import RemedyBody
from sandbox.model.wire.task_conversion import task_failure_body
from sandbox.primitives import fair_client_shares

_RECENT_TASKS = 100
RECENT_REPOSITORIES_MAX = 10
ADDED_HOSTS_MAX = 50
"""Maximum number of hosts that a link to the form can add, because the length of its URL is limited."""

RECENT_BRANCHES_MAX = 20
"""Maximum number of branches for each recent repository."""


@dataclass(frozen=True, slots=True)
class RaisedLimit:
    """A limit that the form increases. field: its path in the manifest; label: its name, such as "the memory"."""

    field: str
    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class RecentRepository:
    """A repository that recent tasks use.

    branches: the branches of these tasks, latest first.
    name: the last two parts of the repository's path.
    """

    url: str
    branches: Sequence[str]
    name: str


async def show_submit(request: Request, context: AppContext) -> Response:
    """Render the form with an empty manifest, or with the manifest of the task to rerun.

    `allow` (query parameter, repeatable): another host that the new task may reach. A value that is not a host is
    ignored. `field`: the field to change, which has the focus. A limit that caused the failure has the value that the
    failure's remedy proposes.
    """
    rerun_of_id = request.query_params.get("from")
    async with fair_client_shares.thread_slot():
        task = await context.services.tasks.status(rerun_of_id) if rerun_of_id else None
        recent = (await context.services.tasks.query(TaskQuery(limit=_RECENT_TASKS))).tasks
        return await fair_client_shares.to_thread(_render_submit, request, task, recent, context)


def _render_submit(request: Request, task: Task | None, recent: Sequence[Task], context: AppContext) -> Response:
    settings = context.settings
    sees_all = get_caller(request).is_operator
    requested = request.query_params.getlist("allow")[:ADDED_HOSTS_MAX] if task else []
    allowed = [host for host in dict.fromkeys(requested) if ALLOWED_HOST.find_error(host) is None]
    manifest = _allow_hosts(task.manifest, allowed) if task and allowed else task.manifest if task else None
    error = task_failure_body(task, is_operator=sees_all) if task else None
    raised = None
    if manifest and error and error["remedy"] and error["remedy"]["field"] == request.query_params.get("field"):
        manifest, raised = _raise_limit(manifest, error["remedy"])
    text = manifest_yaml(manifest, settings.agents, with_sources=sees_all) if manifest else None
    return render_page(
        request,
        "submit",
        patterns=[template for agent in settings.agents.values() for template in agent.manifest_templates],
        text=text or empty_manifest(settings.agents),
        agents=list(settings.agents),
        rerun_of=task,
        allowed=allowed,
        raised=raised,
        failure=describe_failure(error) if error else None,
        offers_sessions=any(hasattr(agent.section_type, "headless") for agent in settings.agents.values()),
        models=[model for agent in settings.agents.values() for model in agent.priced_models],
        repositories=recent_repositories(recent),
        profiles=sorted(settings.list_profiles()) if settings.list_profiles else [],
        vm=Vm(),
        lifecycle=Lifecycle(),
    )


def _allow_hosts(manifest: Manifest, added: Sequence[str]) -> Manifest:
    """Return the manifest with these hosts added to the hosts that the sandbox may reach."""
    hosts = dict.fromkeys((*manifest.vm.allowed_hosts, *added))
    return manifest.replace(vm=replace(manifest.vm, network_mode="outbound", allowed_hosts=tuple(hosts)))


def _raise_limit(manifest: Manifest, remedy: RemedyBody) -> tuple[Manifest, RaisedLimit | None]:
    """Return the manifest with the value that the remedy proposes for a limit of the task."""
    if not remedy["overrides"]:
        return manifest, None
    override = parse_override(remedy["overrides"][0])
    section, name = map(str, override.path)
    field = f"{section}.{name}"
    if section == manifest.agent.kind:
        before = manifest.agent.settings[name]
        changed = manifest.replace(agent=manifest.agent.with_setting(name, override.value))
    else:
        values = getattr(manifest, section)
        before = getattr(values, name)
        changed = manifest.replace(**{section: replace(values, **{name: override.value})})
    return changed, RaisedLimit(field, field_words(field), *map(_format_limit, (before, override.value)))


def _format_limit(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


def empty_manifest(agents: Mapping[str, Agent]) -> str:
    """Return a manifest for the first agent, with only the required fields, for the user to fill in."""
    return write_yaml(
        {
            "version": "1",
            "kind": "Task",
            "metadata": {"name": ""},
            "repository": {"url": "", "branch": "main"},
            next(iter(agents)): {"prompt": ""},
        }
    )


def recent_repositories(tasks: Sequence[Task]) -> Sequence[RecentRepository]:
    """Return the repositories of these tasks and their branches, in order, without duplicates.

    A repository or branch that could not be cloned is left out, unless another task could clone it.
    """
    branches: dict[str, dict[str, None]] = {}
    for task in tasks:
        if task.failure and task.failure.code == FailureCode.CLONE_FAILED:
            continue
        repository = task.manifest.repository
        branches.setdefault(public_repository_url(repository.url), {})[repository.branch] = None
    return [
        RecentRepository(url, list(names)[:RECENT_BRANCHES_MAX], short_repository(url))
        for url, names in list(branches.items())[:RECENT_REPOSITORIES_MAX]
    ]
