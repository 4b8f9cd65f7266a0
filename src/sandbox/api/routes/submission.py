"""The route that submits a task, and what all routes that submit one share: parameters, idempotency and responses."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Header, Query, Request

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.json_responses import JsonResponse
from sandbox.api.middleware.authentication import require_valid_credentials
from sandbox.api.request_body import body_memory, read_body
from sandbox.api.request_parsing import has_json_body, with_body_parser
from sandbox.api.route_declarations import (
    Responses,
    component_ref,
    create_router,
    json_response,
    problem_responses,
    request_body,
)
from sandbox.api.task_json import links_body, resolved_manifest_body
from sandbox.interfaces.server_services import Submission, TaskNotFoundError
from sandbox.model.events import Idempotency
from sandbox.model.input_errors import FieldError, InvalidParameterError
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.model.manifest.parser import MANIFEST_KEY, MANIFEST_TEXT_KEY, parse_manifest
from sandbox.model.manifest.schema import Manifest
from sandbox.model.wire.task_bodies import DryRunBody, SubmittedBody
from sandbox.model.wire.task_conversion import format_timestamp
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
@with_body_parser(lambda content, request: _parse_submission(content, request, request.app.state.context))
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
    list_profile_problems = context.settings.list_profile_problems
    return parse_manifest(
        body,
        agents=context.settings.agents,
        is_json=has_json_body(request),
        profile_problems=None if list_profile_problems is None else list_profile_problems(),
        clone_hosts=context.clone_hosts(),
    )
