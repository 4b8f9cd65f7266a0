"""JSON representation of tasks."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import msgspec

from sandbox.api import paths
from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.runtime import TIER_DESCRIPTIONS
from sandbox.interfaces.server_services import TaskQueries, TaskSandboxes
from sandbox.model.display_text import format_timestamp
from sandbox.model.manifest.schema import Manifest
from sandbox.model.repository_urls import public_repository_url
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import prompt_hint
from sandbox.model.wire.task_bodies import (
    ChainBody,
    DiffBody,
    JobBody,
    LinksBody,
    ResolvedManifestBody,
    TaskBody,
    TaskCancelBody,
    TaskItemBody,
    TaskVmBody,
)
from sandbox.model.wire.task_conversion import attempt_bodies, progress_body, task_failure_body


async def task_body(tasks: TaskQueries, sandboxes: TaskSandboxes, task: Task, *, is_operator: bool) -> TaskBody:
    """Return the full status of a task."""
    is_preserved = await sandboxes.has_preserved_sandbox(task)
    item = task_item_body(task, task.manifest.agent.prompt, is_operator=is_operator, is_preserved=is_preserved)
    totals = chain_totals(await tasks.chain(task))
    chain = None if totals is None else cast("ChainBody", asdict(totals))
    definition = resolved_manifest_body(task.manifest)
    links, job = links_body(task.id), job_body(tasks.job_status(task.id))
    return {**item, "definition": definition, "result": task.result, "links": links, "job": job, "chain": chain}


def job_body(status: JobStatus | None) -> JobBody | None:
    """Return the job that runs a task."""
    if status is None:
        return None
    job_id, host = status.job_id or None, status.host or None
    return {"id": job_id, "phase": status.phase.value, "host": host, "reason": status.reason}


def cluster_host(task: Task) -> str | None:
    """Return the host of the latest attempt; None for the server's own host. See `AttemptLocation.host`."""
    return (task.attempt.host.partition(":")[2] or None) if task.attempt else None


def links_body(task_id: str) -> LinksBody:
    """Return the paths of a task and of related resources."""
    location = paths.task_path(task_id)
    return {
        "self": location,
        "logs": f"{location}/logs",
        "artifacts": f"{location}/artifacts",
        "patch": paths.artifact_path(task_id, f"{task_id}.patch"),
        "manifest": f"{location}/manifest",
        "html": paths.task_page_path(task_id),
    }


def task_item_body(task: Task, prompt: str, *, is_operator: bool, is_preserved: bool) -> TaskItemBody:
    """Return the status of a task as it appears in lists.

    prompt: the beginning of the prompt; only needed for a task that continues or reruns another one.
    """
    metadata, repository, attempt = task.manifest.metadata, task.manifest.repository, task.attempt
    return {
        "id": task.id,
        "name": metadata.name,
        "state": task.state.value,
        "labels": metadata.labels,
        "created_at": format_timestamp(task.created_at),
        "started_at": _optional_timestamp(task.started_at),
        "finished_at": _optional_timestamp(task.finished_at),
        "state_changed_at": format_timestamp(task.state_changed_at),
        "state_message": task.state_message,
        "host": cluster_host(task),
        "vm_name": attempt.sandbox_name if attempt else None,
        "vm_ip": None,
        "vm": _vm_body(task),
        "exit_code": task.exit_code,
        "error": task_failure_body(task, is_operator=is_operator),
        "final_message": task.final_message_or_result,
        "attempts": attempt_bodies(task, is_operator=is_operator),
        "progress": progress_body(task.progress),
        "repository": public_repository_url(repository.url),
        "branch": repository.branch,
        "base_commit": task.base_commit,
        "cancel": _cancel_body(task),
        "diff": _diff_body(task),
        "duration_seconds": task.duration_seconds(datetime.now(UTC)),
        "parent": task.parent.task_id if task.parent else None,
        "rerun_of": task.rerun_of,
        "prompt_beginning": prompt_hint(prompt, metadata.name) or None if is_derived(task) else None,
        "continues": _conversation_source(task),
        "sandbox_kept": is_preserved,
    }


def is_derived(task: Task) -> bool:
    """Return whether the task continues or reruns another one."""
    return task.parent is not None or task.rerun_of is not None


@dataclass(frozen=True, slots=True)
class ChainTotals:
    """Totals across all tasks in a chain."""

    tasks: int
    cost_usd: float
    duration_seconds: float


def chain_totals(chain: Sequence[Task]) -> ChainTotals | None:
    """Return the totals of a chain of tasks that continue one another; None for a single task."""
    if len(chain) < 2:
        return None
    now = datetime.now(UTC)
    cost_usd = round(sum(task.progress.cost_usd for task in chain), 9)
    return ChainTotals(len(chain), cost_usd, round(sum(task.duration_seconds(now) or 0.0 for task in chain), 3))


def _cancel_body(task: Task) -> TaskCancelBody | None:
    if task.cancel is None or task.cancel_requested_at is None:
        return None
    return {"requested_at": format_timestamp(task.cancel_requested_at), "reason": task.cancel.reason or None}


def _diff_body(task: Task) -> DiffBody | None:
    diff = task.diff
    return None if diff is None else {"files": diff.files, "additions": diff.additions, "deletions": diff.deletions}


def _conversation_source(task: Task) -> Literal["session", "context"] | None:
    if task.parent is None:
        return None
    return "context" if task.parent.session is None else "session"


def _optional_timestamp(at: datetime | None) -> str | None:
    return format_timestamp(at) if at else None


def _vm_body(task: Task) -> TaskVmBody:
    vm, attempt = task.manifest.vm, task.attempt
    return {
        "runtime": attempt.runtime if attempt else None,
        "tier": attempt.tier if attempt else None,
        "isolates": TIER_DESCRIPTIONS.get(attempt.tier or "") if attempt else None,
        "image": attempt.image if attempt else None,
        "profile": vm.profile,
        "cpus": vm.cpus,
        "memory": vm.memory,
        "disk": vm.disk,
        "network_mode": vm.network_mode,
    }


def _patch_digest(patch: str | None) -> str | None:
    """Return a digest to show instead of the patch, because a patch can be half a megabyte long."""
    if patch is None:
        return None
    try:
        content = base64.b64decode(patch)
    except ValueError:  # a damaged journal
        content = patch.encode(errors="replace")
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def resolved_manifest_body(manifest: Manifest) -> ResolvedManifestBody:
    """Return the manifest with defaults filled in, and with only the names of secrets."""
    definition: dict[str, Any] = {
        "repository": {**msgspec.to_builtins(manifest.repository), "patch": _patch_digest(manifest.repository.patch)},
        manifest.agent.kind: dict(manifest.agent.settings),
        "vm": msgspec.to_builtins(manifest.vm),
        "secrets": [{"name": secret.name} for secret in manifest.secrets],
        "lifecycle": msgspec.to_builtins(manifest.lifecycle),
    }
    return cast("ResolvedManifestBody", definition)
