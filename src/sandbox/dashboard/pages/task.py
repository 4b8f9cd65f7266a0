"""The page of one task, its events as resumable server-sent events, and the bundle of its results.

The bundle is a tar with patch, metadata, transcript, their checksums and the manifest.
"""

import tarfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import get_caller
from sandbox.api.request_parsing import SEQ, accepts_html, check_format, parse_seq
from sandbox.api.routes.artifacts import content_disposition
from sandbox.api.streaming_response import SSE_KEEP_ALIVE, EventStreamResponse, MessageBatch, close_iterator
from sandbox.api.task_json import chain_totals, cluster_host, job_body
from sandbox.dashboard.failure_notice import describe_failure
from sandbox.dashboard.templates import quote_segment, render_page
from sandbox.interfaces.runtime import TIER_DESCRIPTIONS
from sandbox.interfaces.server_services import StoredArtifact, TaskNotFoundError, TaskQueries
from sandbox.interfaces.store import TaskQuery
from sandbox.model.artifacts import Artifact
from sandbox.model.manifest.yaml import manifest_yaml
from sandbox.model.repository_urls import public_repository_url, short_repository
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_generated_id, is_generated_id_prefix
from sandbox.model.task_state import TaskState
from sandbox.model.wire.event_conversion import WireEvent, estimate_memory_bytes
from sandbox.model.wire.task_conversion import task_failure_body
from sandbox.primitives import fair_client_shares

PAGE_EVENTS_MAX = 200_000
"""Maximum number of events that the page shows. It shows the latest ones; the log contains all of them."""

_BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PageEncoder:
    """Encodes a batch as one message, because a page can handle only about a thousand messages per second."""

    def encode(self, events: Sequence[WireEvent]) -> MessageBatch:
        """Encode the events as one JSON array, with the last seq as its id."""
        return (b"id: %d\ndata: " % events[-1]["seq"] + msgspec.json.encode(events) + b"\n\n",)


async def send_events(request: Request, context: AppContext) -> Response:
    """Send the events after `after` or the Last-Event-ID, then live events until the task ends."""
    task = await context.services.tasks.status(request.path_params["task_id"])
    resumed = parse_seq(check_format(request.headers.get("last-event-id", ""), SEQ, "Last-Event-ID", "header"))
    requested = parse_seq(check_format(request.query_params.get("after", ""), SEQ, "after", "query"))
    after = (requested if resumed is None else resumed) or 0
    is_finished = task.state.is_final
    if is_finished and after > task.last_seq:
        return Response(status_code=204)
    encoder = PageEncoder()
    return EventStreamResponse(
        _encode_batches(context.services.events.recorded_events(task.id, after=after), encoder)
        if is_finished
        else context.stream_cache.follow(task, encoder, after=after),
        "text/event-stream",
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        tracker=context.metrics.track_stream("logs"),
    )


async def _encode_batches(events: AsyncIterator[WireEvent], encoder: PageEncoder) -> AsyncIterator[MessageBatch]:
    """Encode an ended task's events in large messages, because a message takes the page as long as a hundred events."""
    batch: list[WireEvent] = []
    batch_bytes = 0
    try:
        async for event in events:
            batch.append(event)
            batch_bytes += estimate_memory_bytes(event)
            if batch_bytes > _BATCH_BYTES:
                yield encoder.encode(batch)
                batch, batch_bytes = [], 0
            del event  # release the event's memory before waiting for the next event
        if batch:
            yield encoder.encode(batch)
    finally:
        await close_iterator(events)


_CHUNK_BYTES = 64 * 1024


async def send_results_bundle(request: Request, context: AppContext) -> Response:
    """Send the tar. `sha256sum -c SHA256SUMS` verifies its files; `metadata.json` describes them."""
    sees_all = get_caller(request).is_operator
    async with fair_client_shares.thread_slot():
        task = await context.services.tasks.status(request.path_params["task_id"])
        stored = [
            one
            for one in await context.services.artifacts.list_artifacts(task.id)
            if one.artifact.is_generated and (sees_all or not one.artifact.contains_secret)
        ]
        manifest = await fair_client_shares.to_thread(
            manifest_yaml, task.manifest, context.settings.agents, with_id=True, with_sources=sees_all
        )
    headers = {"content-disposition": content_disposition(f"{task.id}.proof.tar")}
    tar = _tar(task.id, task.state_changed_at, manifest, stored)  # streams do not keep the task, which may be large
    return StreamingResponse(tar, media_type="application/x-tar", headers=headers)


async def _tar(
    task_id: str, ended_at: datetime, manifest: str, stored: Sequence[StoredArtifact]
) -> AsyncIterator[bytes]:
    sums = "".join(f"{one.artifact.checksum.removeprefix('sha256:')}  {one.artifact.name}\n" for one in stored)
    texts = {"SHA256SUMS": sums, "manifest.yaml": manifest}
    for name, text in texts.items():
        content = text.encode()
        yield _tar_header(task_id, name, len(content), ended_at) + content + _padding(len(content))
    for one in stored:
        yield _tar_header(task_id, one.artifact.name, one.artifact.size_bytes, one.created_at)
        async for chunk in _read_artifact(one):
            yield chunk
        yield _padding(one.artifact.size_bytes)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _read_artifact(stored: StoredArtifact) -> AsyncIterator[bytes]:
    """Yield the recorded number of bytes. Raises OSError if the file is shorter; the error aborts the download."""
    left = stored.artifact.size_bytes
    with await fair_client_shares.to_thread(stored.file.open, "rb") as file:
        while left > 0:
            chunk = await fair_client_shares.to_thread(file.read, min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError(f"{stored.artifact.name} is smaller than recorded.")
            left -= len(chunk)
            yield chunk


def _tar_header(task_id: str, name: str, size_bytes: int, at: datetime) -> bytes:
    entry = tarfile.TarInfo(f"{task_id}/{name}")
    entry.size, entry.mtime, entry.mode = size_bytes, int(at.timestamp()), 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % tarfile.BLOCKSIZE)


_CHILDREN_SHOWN = 3
_PREFIX_LENGTH_MIN = 4
_PREFIX_TASKS_MAX = 200
"""Maximum number of tasks that a search for the beginning of an id reads. The search also finds words of prompts."""


_STATE_SEQUENCE = (
    TaskState.PENDING,
    TaskState.STAGING,
    TaskState.PROVISIONING,
    TaskState.READY,
    TaskState.RUNNING,
    TaskState.COMPLETING,
)


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A state of the task. entered_at: None before the state is entered; duration: None before it is left."""

    state: TaskState
    entered_at: datetime | None
    duration: timedelta | None
    is_current: bool


async def show_task(request: Request, context: AppContext) -> Response:
    """Render the task's current status; its scripts load the events and update the page."""
    async with fair_client_shares.thread_slot():
        try:
            task = await context.services.tasks.status(request.path_params["task_id"])
        except TaskNotFoundError as error:
            found = await _find_by_prefix(context.services.tasks, error.task_id) if accepts_html(request) else None
            if found is None:
                raise
            return RedirectResponse(f"/tasks/{quote_segment(found)}", 303)
        return await _render_task(request, context, task)


async def _find_by_prefix(tasks: TaskQueries, prefix: str) -> str | None:
    """Return the id that begins with this prefix, such as the short id on a page; None unless exactly one id does.

    Only ids that the server generated are found by their beginning. An id that a client chose may be the beginning of
    another id, so a link to a deleted task could lead to a different task.
    """
    if len(prefix) < _PREFIX_LENGTH_MIN or not is_generated_id_prefix(prefix):
        return None
    page = await tasks.query(TaskQuery(search=prefix, limit=_PREFIX_TASKS_MAX))
    found = [task.id for task in page.tasks if task.id.startswith(prefix) and is_generated_id(task.id)]
    return found[0] if len(found) == 1 and page.next_cursor is None else None


async def _render_task(request: Request, context: AppContext, task: Task) -> Response:
    is_operator = get_caller(request).is_operator
    failure = task_failure_body(task, is_operator=is_operator)
    agents = context.settings.agents
    is_preserved = await context.services.sandboxes.has_preserved_sandbox(task)
    children = await context.services.tasks.query(TaskQuery(parent=task.id, order="asc", limit=_CHILDREN_SHOWN))
    chain = await context.services.tasks.chain(task)
    repository_url = public_repository_url(task.manifest.repository.url)
    manifest_text = await fair_client_shares.to_thread(manifest_yaml, task.manifest, agents, with_sources=is_operator)
    return await fair_client_shares.to_thread(
        render_page,
        request,
        "task",
        task=task,
        here=f"/tasks/{request.path_params['task_id']}",
        api=paths.task_path(task.id),
        manifest_text=manifest_text,
        state_entries=state_entries(task),
        took=_work_duration(task),
        failure=describe_failure(failure) if failure else None,
        isolates=TIER_DESCRIPTIONS.get(task.attempt.tier or "") if task.attempt else None,
        host=cluster_host(task),
        job=job_body(context.services.tasks.job_status(task.id)),
        artifacts=await context.services.artifacts.list_artifacts(task.id),
        patch=_find_patch(task, f"{task.id}.patch", is_operator=is_operator),
        chain_patch=_find_patch(task, f"{task.id}.chain.patch", is_operator=is_operator),
        repository_url=repository_url,
        repository_name=short_repository(repository_url),
        children=children.tasks,
        child_count=children.total_count,
        after=max(0, task.last_seq - PAGE_EVENTS_MAX),
        is_preserved=is_preserved,
        data_to_delete=describe_data_to_delete(task, is_preserved=is_preserved),
        refusal=await context.services.derived_tasks.continuation_refusal(task) if task.state.is_final else None,
        has_anything_to_continue=_has_anything_to_continue(task),
        chain=chain_totals(chain),
        chain_start=chain[0].id,
    )


def _find_patch(task: Task, name: str, *, is_operator: bool) -> Artifact | None:
    """Return the patch with this name if the task has ended, the patch is not empty, and this user may download it."""
    patch = next((artifact for artifact in task.artifacts if artifact.name == name), None)
    if patch is None or not task.state.is_final or patch.size_bytes == 0:
        return None
    return None if patch.contains_secret and not is_operator else patch


def _has_anything_to_continue(task: Task) -> bool:
    """Return whether a follow-up has anything to refer to: changes, a conversation, or the work of an earlier task."""
    progress = task.progress
    has_conversation = bool(
        progress.turns or progress.tool_calls or progress.output_tokens or task.final_message_or_result
    )
    has_ended_regularly = task.state is TaskState.COMPLETED or (
        task.manifest.agent.is_interactive and task.started_at is not None
    )
    return has_conversation or has_ended_regularly or task.parent is not None or _has_patch(task)


def _has_patch(task: Task) -> bool:
    return any(artifact.name == f"{task.id}.patch" and artifact.size_bytes for artifact in task.artifacts)


def describe_data_to_delete(task: Task, *, is_preserved: bool) -> str:
    """Return what deleting a finished task removes, as the end of a sentence."""
    has_patch = _has_patch(task)
    parts = ["the conversation", "the output"]
    if has_patch:
        parts.append("the patch")
    if task.artifacts:
        parts.append("all other artifacts" if has_patch else "all artifacts")
    if is_preserved:
        parts.append("the preserved sandbox")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def state_entries(task: Task) -> Sequence[StateEntry]:
    """Return the six states before the end, then the final state; skipped states have no time."""
    entered = {entry.state: entry.at for entry in task.history}
    left = {entry.state: after.at for entry, after in zip(task.history, task.history[1:], strict=False)}
    end = task.state if task.state.is_final else TaskState.COMPLETED
    return [
        StateEntry(
            state,
            entered.get(state),
            left[state] - entered[state] if state in left else None,
            task.state is state,
        )
        for state in (*_STATE_SEQUENCE, end)
    ]


def _work_duration(task: Task) -> timedelta | None:
    """Return the time from the agent's first start to the task's end, as in the task list; None before the end."""
    if task.finished_at is None:
        return None
    seconds = task.duration_seconds(task.finished_at)
    return timedelta(seconds=seconds) if seconds is not None else timedelta()
