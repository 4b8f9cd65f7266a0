"""Routes that create a task from an earlier one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import require_valid_credentials
from sandbox.api.openapi import (
    Responses,
    component_ref,
    create_router,
    declare_parameters,
    json_response,
    problem_responses,
    request_body,
)
from sandbox.api.request_parsing import body_memory, decode_json_body, read_body
from sandbox.api.responses import JsonResponse
from sandbox.api.routes.tasks import (
    IDEMPOTENCY_KEY_PARAMETER,
    SUBMITTED_HEADERS,
    read_idempotency,
    submitted_response,
)
from sandbox.interfaces.tasks import DerivedTaskPlan
from sandbox.model import fixed_limits
from sandbox.model.manifest.document import read_json, to_document, write_json
from sandbox.model.manifest.overrides import Override, OverrideError, apply_overrides, parse_override
from sandbox.model.manifest.parser import validate_document
from sandbox.model.manifest.schema import Manifest, encode_manifest
from sandbox.model.wire.bodies import SubmittedBody
from sandbox.model.wire.requests import OVERRIDES_MAX, ContinueRequest, RerunRequest
from sandbox.primitives import client_fairness

_RERUN_EXAMPLE = '{"overrides": ["vm.cpus=16"], "prompt": "…"}'
_RERUN_BODY = request_body(
    "Changes to the manifest. Without a body, the task is rerun as it was submitted.",
    required=False,
    application_json=component_ref(RerunRequest.__name__),
)
_CONTINUE_EXAMPLE = '{"prompt": "…"}'
_CONTINUE_BODY = request_body(
    "The prompt, and changes to the manifest.", required=True, application_json=component_ref(ContinueRequest.__name__)
)
_RESPONSES: Responses = {
    202: json_response(SubmittedBody, headers=SUBMITTED_HEADERS),
    **problem_responses(404, 408, 409, 413, 422, 503, 507),
}

RequestT = TypeVar("RequestT", RerunRequest, ContinueRequest)
PlanDerivedTask = Callable[[str], Awaitable[DerivedTaskPlan]]

router = create_router("Tasks")


@router.post(
    paths.RERUN,
    status_code=202,
    responses=_RESPONSES,
    openapi_extra=_RERUN_BODY | declare_parameters(IDEMPOTENCY_KEY_PARAMETER),
)
async def rerun_task(request: Request, context: ContextDep, task_id: paths.TaskId) -> JsonResponse[SubmittedBody]:
    """Submit a new task with the manifest of this task. This task may be in any state and does not change."""
    plan = context.services.derived_tasks.plan_rerun
    return await _submit(request, context, task_id, plan, RerunRequest, _RERUN_EXAMPLE)


@router.post(
    paths.CONTINUE,
    status_code=202,
    responses=_RESPONSES,
    openapi_extra=_CONTINUE_BODY | declare_parameters(IDEMPOTENCY_KEY_PARAMETER),
)
async def continue_task(request: Request, context: ContextDep, task_id: paths.TaskId) -> JsonResponse[SubmittedBody]:
    """Submit a new task that starts from the result of this task. This task must have ended, and does not change."""
    plan = context.services.derived_tasks.plan_continuation
    return await _submit(request, context, task_id, plan, ContinueRequest, _CONTINUE_EXAMPLE)


async def _submit(
    request: Request, context: AppContext, task_id: str, plan: PlanDerivedTask, kind: type[RequestT], example: str
) -> JsonResponse[SubmittedBody]:
    async with body_memory(request, additional_bytes=fixed_limits.BODY_BYTES_MAX):  # the manifest of the earlier task
        content = await read_body(request)
        idempotency = read_idempotency(request, content)
        submissions = context.services.submissions
        if idempotency is not None and (before := await submissions.find_submission(idempotency)):
            return submitted_response(before)
        changes = decode_json_body(content, kind, example)
        planned = await plan(task_id)
        manifest = await client_fairness.to_thread(_change_manifest, planned, changes, context)
        require_valid_credentials(request, context.authenticator)
        inheritance = planned.inheritance
        if inheritance is not None and manifest.agent.is_interactive:
            # There is no way to detect whether an interactive session was resumed.
            parent = msgspec.structs.replace(inheritance.parent, session_id=None, session=None)
            inheritance = replace(inheritance, parent=parent)
        rerun_of = task_id if kind is RerunRequest else None
        return submitted_response(await submissions.submit(manifest, idempotency, inheritance, rerun_of))


def _change_manifest(
    planned: DerivedTaskPlan, changes: RerunRequest | ContinueRequest, context: AppContext
) -> Manifest:
    """Return the manifest of the new task, validated like a submitted manifest.

    It has the defaults that were filled in when the earlier task was submitted. Secrets are references in every
    manifest, so the new task reads their values again. Raises InvalidManifestError, InvalidParameterError.
    """
    earlier = planned.manifest
    overrides = _parse_overrides(changes.overrides)
    data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(earlier, enc_hook=encode_manifest))
    del data["metadata"]["id"]
    if changes.prompt is not None:
        data[earlier.agent.kind]["prompt"] = changes.prompt
    try:
        apply_overrides(data, overrides)
    except OverrideError as error:
        raise InvalidParameterError("overrides", str(error)) from None
    profiles = context.settings.profiles
    manifest = validate_document(
        to_document(read_json(write_json(data).decode())),
        agents=context.settings.agents,
        profiles=None if profiles is None else profiles(),
        clone_hosts=context.authenticator.clone_hosts(),
    )
    if planned.inheritance is not None:
        _check_same_work(earlier, manifest)
    return manifest


def _check_same_work(earlier: Manifest, manifest: Manifest) -> None:
    """Raise InvalidParameterError if the new task could not continue the work of the earlier one."""
    if manifest.repository != earlier.repository:
        message = "must not change repository: the task starts from the work of an earlier task"
        raise InvalidParameterError("overrides", message)
    if manifest.agent.kind != earlier.agent.kind:
        raise InvalidParameterError("overrides", f"must not change the agent, which is {earlier.agent.kind}")


def _parse_overrides(texts: Sequence[str]) -> list[Override]:
    if len(texts) > OVERRIDES_MAX:
        raise InvalidParameterError("overrides", f"can have at most {OVERRIDES_MAX} entries", rule="range")
    parsed = []
    for index, text in enumerate(texts):
        try:
            parsed.append(parse_override(text))
        except OverrideError as error:
            raise InvalidParameterError(f"overrides[{index}]", str(error)) from None
    return parsed
