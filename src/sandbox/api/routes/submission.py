"""Routes that submit a task: a new one, or one derived from an earlier task (rerun and continue)."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Header, Query, Request

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.authentication import require_valid_credentials
from sandbox.api.request_parsing import accepts_body, body_memory, has_json_body, parse_json_body, read_body
from sandbox.api.responses import JsonResponse
from sandbox.api.route_declarations import (
    Responses,
    component_ref,
    create_router,
    json_response,
    problem_responses,
    request_body,
)
from sandbox.api.task_json import links_body, resolved_manifest_body
from sandbox.interfaces.server_services import DerivedTaskPlan, Submission, TaskNotFoundError
from sandbox.model import fixed_limits
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import FieldError, InvalidManifestError, InvalidParameterError, field_name
from sandbox.model.events import Idempotency
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.model.manifest.overrides import Override, OverrideError, parse_override
from sandbox.model.manifest.parsed_document import read_json, to_document, write_json
from sandbox.model.manifest.parser import MANIFEST_KEY, MANIFEST_TEXT_KEY, parse_manifest, validate_document
from sandbox.model.manifest.schema import Manifest, encode_manifest
from sandbox.model.task_names_and_ids import is_name_from_prompt, name_from_prompt
from sandbox.model.wire.request_bodies import ContinueRequest, RerunRequest
from sandbox.model.wire.task_bodies import DryRunBody, SubmittedBody
from sandbox.primitives import fair_client_shares
from sandbox.primitives.log_context import TASK_ID

IDEMPOTENCY_KEY_HEADER = "Idempotency-Key"
IDEMPOTENCY_KEY_LENGTH_MAX = 255
IDEMPOTENCY_KEY_PATTERN = rf"^[!-~]{{1,{IDEMPOTENCY_KEY_LENGTH_MAX}}}$"

_IDEMPOTENCY_KEY = pattern_format(
    "idempotency_key",
    IDEMPOTENCY_KEY_PATTERN.strip("^$"),
    f"must be one key of 1 to {IDEMPOTENCY_KEY_LENGTH_MAX} visible ASCII characters",
)
IdempotencyKey = Annotated[
    str,
    _IDEMPOTENCY_KEY,
    Header(
        alias=IDEMPOTENCY_KEY_HEADER,
        description="Requests with the same key and body within 24 hours return the same task, which is submitted "
        "only once; 1 to 255 visible ASCII characters",
    ),
]


def make_idempotency(request: Request, key: str, body: bytes) -> Idempotency | None:
    """Return the idempotency key and the digest of the body, or None if there is no key.

    If the path names a task, the digest also covers the path, because the same body means something different for
    another task.
    """
    if not key:
        return None
    content = body if request.url.path == paths.TASKS else request.url.path.encode() + b"\n" + body
    return Idempotency(key, hashlib.sha256(content).hexdigest())


REPLAYED_HEADER = "Idempotent-Replayed"

SUBMISSION_ERROR_CODES = (
    *("invalid_manifest", "request_timeout", "duplicate_task_id", "payload_too_large"),
    *("idempotency_key_reused", "service_unavailable", "insufficient_resources"),
)
_SUBMITTED_HEADERS = {
    "Location": {"description": "URL of the task", "required": True, "schema": {"type": "string"}},
    REPLAYED_HEADER: {
        "description": "`true` for a repeated key and body; the response is the earlier one",
        "schema": {"type": "string", "enum": ["true"]},
    },
}
SUBMITTED_RESPONSES: Responses = {
    202: json_response(SubmittedBody, headers=_SUBMITTED_HEADERS),
    200: json_response(DryRunBody),
}
"""The responses of routes that submit a task, or only validate its manifest."""

_MANIFEST = component_ref("Manifest")
_WRAPPED_MANIFEST_SCHEMAS = [
    {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}
    for name, schema in ((MANIFEST_KEY, _MANIFEST), (MANIFEST_TEXT_KEY, {"type": "string"}))
]
_MANIFEST_BODY = request_body(
    f'The manifest. JSON may also be wrapped as `{{"{MANIFEST_KEY}": {{…}}}}` or `{{"{MANIFEST_TEXT_KEY}": "…"}}`.',
    required=True,
    application_yaml=_MANIFEST,
    application_json={"anyOf": [_MANIFEST, *_WRAPPED_MANIFEST_SCHEMAS]},
)
DryRun = Annotated[bool, Query(description="Validate the manifest without submitting it")]
_RerunOf = Annotated[str, Query(description="Id of the task that the new task reruns; shown in the new task's status")]

SubmissionResponse = JsonResponse[SubmittedBody] | JsonResponse[DryRunBody]

router = create_router("Tasks")


@router.post(
    paths.TASKS,
    status_code=202,
    responses={
        **SUBMITTED_RESPONSES,
        **problem_responses(*SUBMISSION_ERROR_CODES),
    },
    openapi_extra=_MANIFEST_BODY,
)
@accepts_body(lambda content, request: _parse_submission(content, request, request.app.state.context))
async def submit_task(
    request: Request,
    context: ContextDep,
    dry_run: DryRun = False,
    rerun_of: _RerunOf = "",
    idempotency_key: IdempotencyKey = "",
) -> SubmissionResponse:
    """Submit a task. The task is durable once the response is sent."""
    async with body_memory(request):
        return await _submit(request, context, idempotency_key, dry_run=dry_run, rerun_of=rerun_of)


async def _submit(
    request: Request, context: AppContext, idempotency_key: str, *, dry_run: bool, rerun_of: str
) -> SubmissionResponse:
    content = await read_body(request)
    idempotency = make_idempotency(request, idempotency_key, content)
    submissions = context.services.submissions
    if idempotency is not None and not dry_run and (before := await submissions.find_submission(idempotency)):
        # Manifests that were accepted earlier may be rejected today; replay the submission before parsing.
        return submitted_response(before)
    manifest = await fair_client_shares.to_thread(_parse_submission, content, request, context)
    original_id = await _check_rerun_of(context, rerun_of) if rerun_of else None
    require_valid_credentials(request, context.admission)
    if dry_run:
        return await dry_run_response(context, manifest)
    return submitted_response(await submissions.submit(manifest, idempotency, rerun_of=original_id))


async def _check_rerun_of(context: AppContext, task_id: str) -> str:
    """Return the id if there is a task with this id. Raises InvalidParameterError."""
    try:
        return (await context.services.tasks.status(task_id)).id
    except TaskNotFoundError:
        error = FieldError.at(("rerun_of",), "format", "is not the id of a task", part="query")
        raise InvalidParameterError([error]) from None


async def dry_run_response(context: AppContext, manifest: Manifest) -> JsonResponse[DryRunBody]:
    """Return the response to a valid manifest that is not submitted.

    Raises UnavailableError if the server cannot accept the task now.
    """
    await context.services.submissions.check_acceptance(manifest)
    message = "The manifest is valid; nothing was submitted."
    return JsonResponse({"dry_run": True, "message": message, "definition": resolved_manifest_body(manifest)})


def submitted_response(submission: Submission) -> JsonResponse[SubmittedBody]:
    """Return the response to a submission that was accepted."""
    task = submission.task
    TASK_ID.set(task.id)
    location = paths.task_path(task.id)
    body: SubmittedBody = {
        "id": task.id,
        "task_id": task.id,
        "state": "pending",
        "message": f"Task {task.id} was accepted.",
        "created_at": format_timestamp(task.created_at),
        "links": links_body(task.id),
    }
    return JsonResponse(
        body, 202, {"location": location} | ({REPLAYED_HEADER: "true"} if submission.is_replayed else {})
    )


def _parse_submission(body: bytes, request: Request, context: ContextDep) -> Manifest:
    list_profiles = context.settings.list_profiles
    return parse_manifest(
        body,
        agents=context.settings.agents,
        is_json=has_json_body(request),
        problem_by_profile=None if list_profiles is None else list_profiles(),
        clone_hosts=context.clone_hosts(),
    )


_RERUN_BODY = request_body(
    "Changes to the manifest. Without a body, the task is rerun as it was submitted.",
    required=False,
    application_json=component_ref(RerunRequest.__name__),
)
_CONTINUE_BODY = request_body(
    "The prompt, and changes to the manifest.", required=True, application_json=component_ref(ContinueRequest.__name__)
)
_RERUN_ERROR_CODES = ("task_not_found", *SUBMISSION_ERROR_CODES)

RequestT = TypeVar("RequestT", RerunRequest, ContinueRequest)
PlanDerivedTask = Callable[[str], Awaitable[DerivedTaskPlan]]

_EARLIER_TASK_BYTES = fixed_limits.BODY_BYTES_MAX + 3 * fixed_limits.FOLLOW_BATCH_BYTES
"""Maximum size of the manifest of the earlier task, and of the part of its conversation that is in memory at a time."""

derived_task_router = create_router("Tasks")


@derived_task_router.post(
    paths.RERUN,
    status_code=202,
    responses=SUBMITTED_RESPONSES | problem_responses(*_RERUN_ERROR_CODES),
    openapi_extra=_RERUN_BODY,
)
@accepts_body(lambda content, request: parse_json_body(content, request, RerunRequest))
async def rerun_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    dry_run: DryRun = False,
    idempotency_key: IdempotencyKey = "",
) -> SubmissionResponse:
    """Submit a new task with the manifest of this task. This task may be in any state and does not change."""
    plan = context.services.derived_tasks.plan_rerun
    return await _submit_derived_task(request, context, task_id, plan, RerunRequest, idempotency_key, dry_run=dry_run)


@derived_task_router.post(
    paths.CONTINUE,
    status_code=202,
    responses=SUBMITTED_RESPONSES | problem_responses(*_RERUN_ERROR_CODES, "task_not_ended", "task_not_continuable"),
    openapi_extra=_CONTINUE_BODY,
)
@accepts_body(lambda content, request: parse_json_body(content, request, ContinueRequest))
async def continue_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    dry_run: DryRun = False,
    idempotency_key: IdempotencyKey = "",
) -> SubmissionResponse:
    """Submit a new task that starts from the result of this task. This task must have ended, and does not change."""
    plan = context.services.derived_tasks.plan_continuation
    return await _submit_derived_task(
        request, context, task_id, plan, ContinueRequest, idempotency_key, dry_run=dry_run
    )


async def _submit_derived_task(
    request: Request,
    context: AppContext,
    task_id: str,
    plan: PlanDerivedTask,
    kind: type[RequestT],
    idempotency_key: str,
    *,
    dry_run: bool,
) -> SubmissionResponse:
    async with body_memory(request, additional_bytes=_EARLIER_TASK_BYTES):
        content = await read_body(request)
        idempotency = make_idempotency(request, idempotency_key, content)
        submissions = context.services.submissions
        if idempotency is not None and not dry_run and (before := await submissions.find_submission(idempotency)):
            return submitted_response(before)
        changes = await fair_client_shares.to_thread(parse_json_body, content, request, kind)
        async with fair_client_shares.thread_slot():  # an earlier task with many artifacts uses megabytes
            planned = await plan(task_id)
        manifest = await fair_client_shares.to_thread(_change_manifest, planned, changes, context)
        require_valid_credentials(request, context.admission)
        if dry_run:
            return await dry_run_response(context, manifest)
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

    A name that was derived from the earlier prompt is replaced by one derived from the new prompt. The manifest has the
    defaults that were filled in when the earlier task was submitted. Secrets are references in every manifest, so the
    new task reads their values again. Raises InvalidManifestError, InvalidParameterError.
    """
    earlier = planned.manifest
    data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(earlier, enc_hook=encode_manifest))
    del data["metadata"]["id"]
    if changes.prompt is not None:
        data[earlier.agent.kind]["prompt"] = changes.prompt
        name = name_from_prompt(changes.prompt)
        if name and is_name_from_prompt(earlier.metadata.name, earlier.agent.prompt):
            data["metadata"]["name"] = name
    overrides = _apply_overrides(data, changes.overrides)
    list_profiles = context.settings.list_profiles
    try:
        manifest = validate_document(
            to_document(read_json(write_json(data).decode())),
            agents=context.settings.agents,
            problem_by_profile=None if list_profiles is None else list_profiles(),
            clone_hosts=context.clone_hosts(),
        )
    except InvalidManifestError as error:
        raise InvalidManifestError([_locate(each, overrides) for each in error.errors]) from None
    if planned.inheritance is not None:
        _check_can_continue(earlier, manifest, overrides)
    return manifest


def _locate(error: FieldError, overrides: Sequence[Override]) -> FieldError:
    """Return the error, located at the last override that affects its field, or at the body if no override does."""
    for index, override in reversed([*enumerate(overrides)]):
        name = field_name(override.path)
        if _contains(name, error.field) or _contains(error.field, name):
            return msgspec.structs.replace(error, location=f"body.overrides[{index}]")
    return msgspec.structs.replace(error, location="body")


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith((f"{outer}.", f"{outer}["))


def _check_can_continue(earlier: Manifest, manifest: Manifest, overrides: Sequence[Override]) -> None:
    """Raise InvalidParameterError if the new task could not continue the work of the earlier one."""
    errors = []
    if manifest.repository != earlier.repository:
        message = "must not change: the task starts from the work of an earlier task"
        errors.append(_override_error("repository", message, overrides))
    if manifest.agent.kind != earlier.agent.kind:
        message = f"must not change the agent, which is {earlier.agent.kind}"
        errors.append(_override_error(manifest.agent.kind, message, overrides))
    if errors:
        raise InvalidParameterError(errors)


def _override_error(section: str, message: str, overrides: Sequence[Override]) -> FieldError:
    """Create an error about the last override that sets a section or one of its fields."""
    path = next((each.path for each in reversed(overrides) if each.path[0] == section), (section,))
    return _locate(FieldError.at(path, "format", message), overrides)


def _apply_overrides(data: dict[str, Any], texts: Sequence[str]) -> list[Override]:
    """Apply the overrides in order. Raises InvalidParameterError with all errors."""
    overrides, errors = [], []
    for index, text in enumerate(texts):
        try:
            override = parse_override(text)
            override.apply(data)
            overrides.append(override)
        except OverrideError as error:
            errors.append(FieldError.at(("overrides", index), "format", str(error)))
    if errors:
        raise InvalidParameterError(errors)
    return overrides
