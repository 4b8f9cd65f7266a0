"""The JSON bodies of error responses: the only declaration of each."""

from typing import TypedDict

from sandbox.model.wire.task_bodies import State, Timestamp


class FieldErrorBody(TypedDict):
    """One error in a request."""

    location: str
    """Where the value is in the request, such as `body.vm.memory`, `query.sort` or `header.Idempotency-Key`."""
    field: str
    """Path of the field, such as `vm.memory`, or name of the parameter; empty if the error is about the whole body."""
    rule: str
    """Kind of the rule: `required`, `type`, `enum`, `format`, `range`, `unknown_field` or `not_offered`."""
    message: str
    """Human-readable description of what is expected."""
    suggestion: str | None
    """The valid name or value that a misspelled one resembles; null if there is none."""
    line: int | None
    """Line in a YAML manifest, from 1."""
    column: int | None
    """Column in a YAML manifest, from 1."""


class ExistingTaskBody(TypedDict):
    """The existing task with the same id."""

    id: str
    """Id of the task."""
    state: State
    """Current state."""
    created_at: Timestamp
    """When the task was submitted."""


class ProblemExtensions(TypedDict, total=False):
    """The members of an error response that only some errors have."""

    existing_task: ExistingTaskBody | None
    """The task that already has the id, for `duplicate_task_id`."""
    task_state: State | None
    """State of the task, for `task_already_terminal`, `task_not_ended` and `sandbox_not_found`."""
    requested_cpus: int | None
    """CPUs that the task requests, for `insufficient_resources`."""
    available_cpus: int | None
    """CPUs available for tasks, for `insufficient_resources`."""
    requested_memory: str | None
    """Memory that the task requests, such as `8G`, for `insufficient_resources`."""
    available_memory: str | None
    """Memory available for tasks, for `insufficient_resources`."""
    reasons: list[str] | None
    """Why the server is not ready, for `GET /health/ready`."""


class ProblemBody(ProblemExtensions):
    """An error response: problem details (RFC 9457) with additional members."""

    error: str
    """A stable code for programs. Later versions may add codes."""
    message: str
    """Human-readable cause and remedy."""
    details: list[FieldErrorBody] | None
    """Every error in the request, for `invalid_manifest` and `invalid_parameter`."""
    request_id: str
    """Id of the request in the server's log."""
    type: str
    """`urn:sandbox:error:` and the code."""
    title: str
    """Reason phrase of the status."""
    status: int
    """HTTP status."""
    detail: str
    """The same as `message`, for clients that know only the members of RFC 9457."""
    instance: str
    """Path of the request."""
