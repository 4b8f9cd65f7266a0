"""The JSON bodies about tasks and artifacts: the only declaration of each.

`server_and_error_bodies.py` declares the bodies about the server and of errors.

Routes build them, `api/openapi.py` turns them into OpenAPI, and the Python client returns them. The string
below a property describes it in the schema; it is read from the source only when the schema is built.

Times are RFC 3339 in UTC, with milliseconds and `Z`. A newer server may send additional properties.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

State = Literal[
    "pending",
    "staging",
    "provisioning",
    "ready",
    "running",
    "completing",
    "completed",
    "failed",
    "failed_preserved",
    "cancelled",
]
"""The values of `TaskState` as type checkers of client programs see them."""

FollowUpName = Literal["again", "resume", "retry"]
"""The values of `FollowUp`, the kinds of an attempt that follows another one."""


class JsonSchema:
    """Adds keywords to the JSON Schema of an annotated type."""

    __slots__ = ("keywords",)

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Add the keywords to the schema. Only pydantic calls this, so this module does not import pydantic."""
        return {**handler(core_schema), **self.keywords}


Timestamp = Annotated[str, JsonSchema(format="date-time")]


class LinksBody(TypedDict):
    """Paths of related resources."""

    self: str
    """Path of the task."""
    logs: str
    """Path of the task's logs."""
    artifacts: str
    """Path of the task's artifacts."""
    patch: str
    """Path of the patch. The path returns 404 until the patch is stored."""
    manifest: str
    """Path of the manifest. Reading it requires the `operator` role."""
    html: str
    """Path of the task's page in the dashboard."""


class SubmittedBody(TypedDict):
    """The task was accepted. It is durable: it survives a crash of the server."""

    id: str
    """Id of the task."""
    task_id: Annotated[str, JsonSchema(deprecated=True)]
    """The same as `id`."""
    state: Literal["pending"]
    """The first state of every task."""
    message: str
    """Human-readable confirmation."""
    created_at: Timestamp
    """When the task was accepted."""
    links: LinksBody
    """Paths of the task and of related resources."""


class TaskSecretBody(TypedDict):
    """A secret, by name only."""

    name: str
    """Name of the environment variable."""


class ResolvedManifestBody(TypedDict):
    """The submitted manifest, with the defaults filled in."""

    # The section of any other agent is stored under the key of that agent. `openapi.json` lists the agents.
    repository: dict[str, Any]
    """The manifest's section `repository`; `patch` is the digest of the submitted patch."""
    claude: NotRequired[dict[str, Any]]
    """The manifest's section `claude`."""
    vm: dict[str, Any]
    """The manifest's section `vm`."""
    secrets: list[TaskSecretBody]
    """The secrets, by name only."""
    lifecycle: dict[str, Any]
    """The manifest's section `lifecycle`."""


class DryRunBody(TypedDict):
    """The server would accept this manifest now; nothing was submitted."""

    dry_run: Literal[True]
    """Always true."""
    message: str
    """Human-readable confirmation."""
    definition: ResolvedManifestBody
    """The manifest with the defaults filled in."""


class RemedyBody(TypedDict):
    """What to do about a failure."""

    text: str
    """One sentence, such as `Raise vm.memory.`. The message of the failure may give details."""
    field: str | None
    """The field of the manifest to change, such as `vm.memory`; null if the remedy does not change a field."""
    overrides: list[str]
    """Overrides for `POST /tasks/{id}/rerun`, such as `vm.memory=16G`; empty if there is none to propose."""


class FailureBody(TypedDict):
    """Why the task failed: a stable code, and a message that says what to do."""

    code: str
    """A stable, machine-readable code. Later versions may add codes."""
    reason: str | None
    """A stable word for the cause if the code has several causes; otherwise null. Later versions may add words."""
    message: str
    """Human-readable cause and remedy."""
    remedy: RemedyBody | None
    """What to do, in machine-readable form; null if only the message describes it."""


class TaskVmBody(TypedDict):
    """The sandbox. `isolates` describes the tier. `runtime`, `tier`, `isolates` and `image` are null until known."""

    runtime: str | None
    """Name of the runtime, such as `bubblewrap`."""
    tier: str | None
    """Isolation tier: `namespaces`, `gvisor` or `vm`."""
    isolates: str | None
    """What separates the agent from the host in this tier."""
    image: str | None
    """Digest of the image of the root file system, or `host`."""
    profile: str
    """Profile of the manifest."""
    cpus: int
    """Number of CPUs."""
    memory: str
    """Memory, such as `8G`."""
    disk: str
    """Disk space, such as `40G`."""
    network_mode: str
    """Network access: `isolated`, `outbound` or `full`."""


class ProgressBody(TypedDict):
    """Counters of the work so far. Tokens, cost and denied connections are counted by the gateway."""

    output_bytes: int
    """Size of the agent's output, in bytes."""
    tool_calls: int
    """Number of tool calls."""
    current_tool: str | None
    """The tool that is running."""
    current_subject: str | None
    """What the call to this tool is about, such as a command or a path; null if unknown. If no tool is running, it
    says that the agent is waiting for a background call."""
    last_activity_at: Timestamp | None
    """When the agent was last active."""
    turns: int
    """Number of the model's turns."""
    input_tokens: int
    """Input tokens of all model requests, including cached tokens."""
    output_tokens: int
    """Output tokens of all model requests."""
    cost_usd: float
    """Cost in USD of all model requests that have a price."""
    egress_denied: int
    """Number of connections, requests and names that the gateway refused."""


class AttemptBody(TypedDict):
    """One attempt to run the task."""

    number: int
    """Position among the attempts, from 1."""
    id: str
    """Id of the attempt."""
    started_at: Timestamp | None
    """When the attempt started."""
    ended_at: Timestamp | None
    """When the attempt ended; null while it is running."""
    resumes: bool
    """Whether the attempt continues with the disk of the previous attempt."""
    exit_code: int | None
    """Exit code of the agent; 128 plus the signal number if a signal ended the agent; null if unknown."""
    error: FailureBody | None
    """Why the attempt failed; null if it did not fail, and if it was cancelled."""
    followed_by: FollowUpName | None
    """Why another attempt followed; null for the last attempt."""


class TaskCancelBody(TypedDict):
    """The first cancel request that has an effect on the task."""

    requested_at: Timestamp
    """When the request was stored."""
    reason: str | None
    """Why the task is cancelled; null if no reason was given."""


class DiffBody(TypedDict):
    """The size of a patch."""

    files: int
    """Number of changed files."""
    additions: int
    """Number of added lines; binary files have none."""
    deletions: int
    """Number of deleted lines."""


class TaskItemBody(TypedDict):
    """A task in a list."""

    id: str
    """Id of the task."""
    name: str
    """Name of the manifest."""
    state: State
    """Current state."""
    labels: dict[str, str]
    """Labels of the manifest."""
    created_at: Timestamp
    """When the task was submitted."""
    started_at: Timestamp | None
    """When the agent first started to work."""
    finished_at: Timestamp | None
    """When the task reached its final state."""
    state_changed_at: Timestamp
    """When the current state was entered."""
    state_message: str
    """Human-readable description of the current step or of the outcome."""
    host: str | None
    """Name of the cluster's host that ran the latest attempt; null if this was the server's own machine."""
    vm_name: str | None
    """Name of the latest sandbox."""
    vm_ip: Annotated[None, JsonSchema(deprecated=True)]
    """Always null: a sandbox has no address."""
    vm: TaskVmBody
    """The latest sandbox."""
    exit_code: int | None
    """Exit code of the agent; 128 plus the signal number if a signal ended the agent; null if unknown."""
    error: FailureBody | None
    """Why the task failed; null if it did not fail, if it was cancelled, and if another attempt follows."""
    final_message: str | None
    """The agent's last message, redacted; null until the agent has exited, and if there is none.

    A message of more than 10,000 characters is cut and ends with `…`. The logs have the complete message.
    """
    attempts: list[AttemptBody]
    """Every attempt, oldest first."""
    progress: ProgressBody
    """Counters of the work so far, across all attempts."""
    repository: str
    """URL of the repository, without credentials."""
    branch: str
    """Branch that was cloned."""
    base_commit: str | None
    """Commit at which the patch starts; null until the repository is cloned.

    If `repository.patch` or the changes of earlier tasks were applied first, the remote repository does not have
    this commit.
    """
    cancel: TaskCancelBody | None
    """The cancel request; null if there is none, and if the agent had exited before the request."""
    diff: DiffBody | None
    """Size of the patch; null until it is stored, and if it is incomplete or its size was not recorded."""
    duration_seconds: float | None
    """Time from the agent's first start to the end of the task, or until now; null if the agent never started."""
    parent: str | None
    """Id of the task that this one continues; null for any other task. That task may have been removed."""
    rerun_of: str | None
    """Id of the task that this one runs again; null for any other task. That task may have been removed."""
    prompt_beginning: str | None
    """Beginning of the prompt, if the task continues or reruns another one and its name is not already that beginning.

    Null otherwise. At most 120 characters.
    """
    continues: Literal["session", "context"] | None
    """How the agent gets the earlier conversation: it resumes the `session`, or it gets the text as `context`."""
    sandbox_kept: bool
    """Whether a preserved sandbox exists that can be inspected and released.

    False for a task in the state `failed_preserved` whose sandbox was released or has expired.
    """


class ChainBody(TypedDict):
    """Totals of a chain: the tasks that a task continues, the task itself, and the tasks that continue it."""

    tasks: int
    """Number of tasks, at most 100. Tasks that were removed are not counted."""
    cost_usd: float
    """Cost in USD of these tasks."""
    duration_seconds: float
    """Sum of the durations of these tasks."""


class JobBody(TypedDict):
    """The job with which the engine of a cluster runs a task."""

    id: str | None
    """The engine's id of the job; null until it is known."""
    phase: Literal["waiting", "running", "ended", "unreachable", "unknown"]
    """`unreachable`: the job's host is not responding. `unknown`: the engine does not have the job (yet)."""
    host: str | None
    """Name of the host of the job; null until the engine has selected one."""
    reason: str
    """Human-readable reason for the phase, such as why the job is waiting."""


class TaskBody(TaskItemBody):
    """The status of a task."""

    definition: ResolvedManifestBody
    """The manifest with the defaults filled in."""
    result: dict[str, Any] | None
    """The agent's own report on its run. Its keys depend on the agent, unlike `final_message`.

    If `continues` is `session`, it covers earlier tasks too; `progress.cost_usd` is the cost of this task alone.
    """
    links: LinksBody
    """Paths of the task and of related resources."""
    job: JobBody | None
    """The job that runs the task on a cluster; null if there is none, and once it is no longer needed."""
    chain: ChainBody | None
    """Totals of the chain; null if the task neither continues another task nor is continued by one."""


class TaskTotalsBody(TypedDict):
    """Totals of all tasks that match the filters, on all pages."""

    tasks: int
    """Number of tasks."""
    cost_usd: float
    """Cost in USD of all model requests of these tasks that have a price."""


class TaskListBody(TypedDict):
    """A page of tasks."""

    tasks: list[TaskItemBody]
    """The tasks of this page."""
    total_count: int
    """Number of tasks on all pages."""
    limit: int
    """Maximum number of tasks on a page."""
    offset: int
    """Number of tasks before this page, as requested."""
    has_more: bool
    """Whether another page follows."""
    next_cursor: str | None
    """Value of `cursor` for the next page; null on the last one."""
    totals: TaskTotalsBody | None
    """Totals of all pages; null without `totals=true`."""


class CancelledBody(TypedDict):
    """The cancel request is stored. The task ends shortly. A request after the agent's exit changes nothing."""

    success: Literal[True]
    """Always true."""
    id: str
    """Id of the task."""
    task_id: Annotated[str, JsonSchema(deprecated=True)]
    """The same as `id`."""
    previous_state: State
    """State of the task when the request was stored."""
    new_state: Literal["cancelled"]
    """State in which the task will end, unless its agent had exited before the request; see `message`."""
    message: str
    """Human-readable description of what happens next."""
    state: State
    """Current state. A running task is cancelled once its artifacts have been collected."""
    requested_at: Timestamp
    """When the first request was stored. A repeated request returns the same time."""
    cancelled_at: Annotated[Timestamp, JsonSchema(deprecated=True)]
    """The same as `requested_at`. `finished_at` in the status is when the task ended."""


class ReleasedBody(TypedDict):
    """The preserved sandbox was removed."""

    success: Literal[True]
    """Always true."""
    id: str
    """Id of the task."""
    task_id: Annotated[str, JsonSchema(deprecated=True)]
    """The same as `id`."""
    message: str
    """Human-readable confirmation."""


class DeletedBody(TypedDict):
    """The task was deleted. The deletion is durable: it survives a crash of the server."""

    success: Literal[True]
    """Always true."""
    id: str
    """Id of the task, which can be used again."""
    task_id: Annotated[str, JsonSchema(deprecated=True)]
    """The same as `id`."""
    message: str
    """Human-readable confirmation."""


class ArtifactBody(TypedDict):
    """One artifact."""

    name: str
    """Name, unique in the task."""
    path: str
    """Path relative to the workspace, or `.sandbox/NAME` for a file that Sandbox generated."""
    size_bytes: int
    """Size in bytes."""
    content_type: str
    """Media type, guessed from the name."""
    checksum: str
    """`sha256:` and 64 hexadecimal digits."""
    created_at: Timestamp
    """When the artifact was stored."""
    download_url: str
    """Path of the artifact's content."""
    contains_secret: bool
    """Whether the file contains a secret's value; if it does, its download requires the `operator` role."""


class ArtifactListBody(TypedDict):
    """All artifacts of a task."""

    task_id: str
    """Id of the task."""
    artifacts: list[ArtifactBody]
    """The artifacts, in the order in which they were stored."""
    total_count: int
    """Number of artifacts in `artifacts`."""
    total_size_bytes: int
    """Total size of the artifacts, in bytes."""
