"""Routes that create a task from an earlier one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.middleware.authentication import require_valid_credentials
from sandbox.api.request_body import body_memory, read_body
from sandbox.api.request_parsing import parse_json_body, with_body_parser
from sandbox.api.route_declarations import component_ref, create_router, problem_responses, request_body
from sandbox.api.routes.submission import (
    SUBMISSION_ERROR_CODES,
    SUBMITTED_RESPONSES,
    DryRun,
    IdempotencyKey,
    SubmissionResponse,
    dry_run_response,
    make_idempotency,
    submitted_response,
)
from sandbox.interfaces.server_services import DerivedTaskPlan
from sandbox.model import fixed_limits
from sandbox.model.input_errors import FieldError, InvalidManifestError, InvalidParameterError, field_name
from sandbox.model.manifest.document import to_document
from sandbox.model.manifest.json import read_json, write_json
from sandbox.model.manifest.overrides import Override, OverrideError, parse_override
from sandbox.model.manifest.parser import validate_document
from sandbox.model.manifest.schema import Manifest, encode_manifest
from sandbox.model.task_names import is_name_from_prompt, name_from_prompt
from sandbox.model.wire.request_bodies import ContinueRequest, RerunRequest
from sandbox.primitives import fair_client_shares

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

router = create_router("Tasks")


@router.post(
    paths.RERUN,
    status_code=202,
    responses=SUBMITTED_RESPONSES | problem_responses(*_RERUN_ERROR_CODES),
    openapi_extra=_RERUN_BODY,
)
@with_body_parser(lambda content, request: parse_json_body(content, request, RerunRequest))
async def rerun_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    dry_run: DryRun = False,
    idempotency_key: IdempotencyKey = "",
) -> SubmissionResponse:
    """Submit a new task with the manifest of this task. This task may be in any state and does not change."""
    plan = context.services.derived_tasks.plan_rerun
    return await _submit(request, context, task_id, plan, RerunRequest, idempotency_key, dry_run=dry_run)


@router.post(
    paths.CONTINUE,
    status_code=202,
    responses=SUBMITTED_RESPONSES | problem_responses(*_RERUN_ERROR_CODES, "task_not_ended", "task_not_continuable"),
    openapi_extra=_CONTINUE_BODY,
)
@with_body_parser(lambda content, request: parse_json_body(content, request, ContinueRequest))
async def continue_task(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    dry_run: DryRun = False,
    idempotency_key: IdempotencyKey = "",
) -> SubmissionResponse:
    """Submit a new task that starts from the result of this task. This task must have ended, and does not change."""
    plan = context.services.derived_tasks.plan_continuation
    return await _submit(request, context, task_id, plan, ContinueRequest, idempotency_key, dry_run=dry_run)


async def _submit(
    request: Request,
    context: AppContext,
    task_id: str,
    plan: PlanDerivedTask,
    kind: type[RequestT],
    idempotency_key: str,
    *,
    dry_run: bool,
) -> SubmissionResponse:
    async with body_memory(request, additional_bytes=fixed_limits.BODY_BYTES_MAX):  # the manifest of the earlier task
        content = await read_body(request)
        idempotency = make_idempotency(request, idempotency_key, content)
        submissions = context.services.submissions
        if idempotency is not None and not dry_run and (before := await submissions.find_submission(idempotency)):
            return submitted_response(before)
        changes = parse_json_body(content, request, kind)
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
    list_profile_problems = context.settings.list_profile_problems
    try:
        manifest = validate_document(
            to_document(read_json(write_json(data).decode())),
            agents=context.settings.agents,
            profile_problems=None if list_profile_problems is None else list_profile_problems(),
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
