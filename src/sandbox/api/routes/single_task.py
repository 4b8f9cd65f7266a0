"""Routes of a task after its submission: read, wait for, cancel and delete it, and release its sandbox."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.errors import ManifestForbiddenError
from sandbox.api.json_responses import JsonResponse
from sandbox.api.middleware.authentication import get_caller, require_valid_credentials
from sandbox.api.request_body import body_memory, read_body
from sandbox.api.request_parsing import parse_json_body, with_body_parser
from sandbox.api.route_declarations import component_ref, create_router, problem_responses, request_body
from sandbox.api.streaming.response import wait_for_disconnect
from sandbox.api.task_json import task_body
from sandbox.model.manifest.field_formats import NO_CONTROL_CHARACTERS
from sandbox.model.manifest.writer import manifest_data
from sandbox.model.task import Task
from sandbox.model.wire.request_bodies import REASON_LENGTH_MAX, CancelRequest
from sandbox.model.wire.task_bodies import CancelledBody, DeletedBody, ReleasedBody, TaskBody
from sandbox.model.wire.task_conversion import format_timestamp
from sandbox.primitives import fair_client_shares
from sandbox.primitives.concurrency import run_until_first_complete

WAIT_SECONDS_MAX = 600

_Reason = Annotated[
    str,
    NO_CONTROL_CHARACTERS,
    Query(max_length=REASON_LENGTH_MAX, description="Why the task is cancelled; stored with the task; one line"),
]
_Force = Annotated[bool, Query(description="Do not wait for the agent to exit on its own")]
_CANCEL_BODY = request_body(
    "The query parameters may be given here instead.",
    required=False,
    application_json=component_ref("CancelRequest"),
)

router = create_router("Tasks")


@router.get(paths.TASK, responses=problem_responses("task_not_found", "service_unavailable"))
async def get_task(request: Request, context: ContextDep, task_id: paths.TaskId) -> JsonResponse[TaskBody]:
    """Get the status of a task."""
    return JsonResponse(await _current_task_body(request, context, await context.services.tasks.status(task_id)))


@router.get(
    paths.MANIFEST,
    responses={
        200: {"description": "The manifest", "content": {"application/json": {"schema": component_ref("Manifest")}}},
        **problem_responses("task_not_found", "service_unavailable"),
    },
    response_class=Response,
)
async def get_manifest(request: Request, context: ContextDep, task_id: paths.TaskId) -> Response:
    """Get the manifest of a task.

    It can be submitted again: it has no id and no fields with default values. It contains the sources of secrets, but
    not their values, so reading it requires the operator role. `definition` in the status contains only the names of
    secrets.
    """
    if not get_caller(request).is_operator:
        raise ManifestForbiddenError
    task = await context.services.tasks.status(task_id)
    return await fair_client_shares.to_thread(
        lambda: JsonResponse(manifest_data(task.manifest, context.settings.agents))
    )


async def _current_task_body(request: Request, context: AppContext, task: Task) -> TaskBody:
    services = context.services
    return await task_body(services.tasks, services.sandboxes, task, is_operator=get_caller(request).is_operator)


@router.get(paths.WAIT, responses=problem_responses("task_not_found", "service_unavailable"))
async def wait_for_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    timeout: Annotated[float, Query(ge=0, le=WAIT_SECONDS_MAX, description="Maximum time to wait, in seconds")] = 60,  # noqa: ASYNC109
) -> JsonResponse[TaskBody]:
    """Wait until a task has ended or the timeout has expired; return the task's status."""
    tasks = context.services.tasks
    # A disconnect or a shutdown ends the wait early.
    result = await run_until_first_complete(
        tasks.wait(task_id, timeout), context.shutting_down.wait(), wait_for_disconnect(request.receive)
    )
    task = result if isinstance(result, Task) else await tasks.status(task_id)
    return JsonResponse(await _current_task_body(request, context, task))


@router.delete(
    paths.TASK,
    responses=problem_responses(
        "task_not_found", "request_timeout", "task_already_terminal", "payload_too_large", "service_unavailable"
    ),
    openapi_extra=_CANCEL_BODY,
)
@with_body_parser(lambda content, request: parse_json_body(content, request, CancelRequest))
async def cancel_task(
    request: Request, context: ContextDep, task_id: paths.TaskId, reason: _Reason = "", *, force: _Force = False
) -> JsonResponse[CancelledBody]:
    """Cancel a task. The request can be repeated with `force`, which skips the grace period."""
    async with body_memory(request):
        content = await read_body(request)
        cancel_request = parse_json_body(content, request, CancelRequest, {"reason": reason, "force": force})
    require_valid_credentials(request, context.admission)
    cancellation = await context.services.cancellation.cancel(
        task_id, reason=cancel_request.reason, force=cancel_request.force
    )
    body: CancelledBody = {
        "success": True,
        "id": cancellation.task_before.id,
        "task_id": cancellation.task_before.id,
        "previous_state": cancellation.task_before.state.value,
        "new_state": "cancelled",
        "message": cancellation.message,
        "state": cancellation.state.value,
        "requested_at": format_timestamp(cancellation.requested_at),
        "cancelled_at": format_timestamp(cancellation.requested_at),
    }
    return JsonResponse(body)


@router.delete(paths.VM, responses=problem_responses("task_not_found", "sandbox_not_found", "service_unavailable"))
async def release_sandbox(context: ContextDep, task_id: paths.TaskId) -> JsonResponse[ReleasedBody]:
    """Remove the preserved sandbox of a task and free its disk space."""
    await context.services.sandboxes.release(task_id)
    message = f"The preserved sandbox of task {task_id} is released."
    body: ReleasedBody = {"success": True, "id": task_id, "task_id": task_id, "message": message}
    return JsonResponse(body)


@router.delete(paths.DATA, responses=problem_responses("task_not_found", "task_not_ended", "service_unavailable"))
async def delete_task(context: ContextDep, task_id: paths.TaskId) -> JsonResponse[DeletedBody]:
    """Delete a task that has ended, with all its data: journal, artifacts and any preserved sandbox."""
    message = await context.services.deletion.delete(task_id)
    body: DeletedBody = {"success": True, "id": task_id, "task_id": task_id, "message": message}
    return JsonResponse(body)
