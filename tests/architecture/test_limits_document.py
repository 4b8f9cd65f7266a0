"""docs/limits.md states the values that the code enforces."""

import importlib
import math
import re
from pathlib import Path

import pytest

# section, limit, constant
ROWS = [
    ("Manifests", "Request body or manifest", "model.fixed_limits.BODY_BYTES_MAX"),
    ("Manifests", "Nesting depth of a manifest", "model.fixed_limits.MANIFEST_DEPTH_MAX"),
    ("Manifests", "Values in a manifest", "model.fixed_limits.MANIFEST_VALUES_MAX"),
    ("Manifests", "YAML aliases in a manifest", "model.fixed_limits.MANIFEST_ALIASES_MAX"),
    ("Manifests", "Labels of a task", "model.fixed_limits.LABELS_MAX"),
    ("Manifests", "Prompt", "model.manifest.field_formats.PROMPT_BYTES_MAX"),
    ("Manifests", "`repository.patch`", "model.manifest.field_formats.GIT_PATCH_BYTES_MAX"),
    ("Manifests", "A duration in a manifest", "model.manifest.field_formats.DURATION_SECONDS_MAX"),
    ("Manifests", "Errors listed for one manifest or request", "model.fixed_limits.INPUT_ERRORS_MAX"),
    ("Output and journal", "One line of output", "model.fixed_limits.OUTPUT_LINE_BYTES_MAX"),
    ("Output and journal", "One line of the agent's output that is parsed", "model.fixed_limits.PARSED_LINE_BYTES_MAX"),
    ("Output and journal", "Output of a task", "model.fixed_limits.OUTPUT_BYTES_MAX"),
    ("Output and journal", "Output per second", "model.fixed_limits.OUTPUT_BYTES_PER_SECOND"),
    ("Output and journal", "Output delay before a flush to disk", "model.fixed_limits.OUTPUT_SYNC_INTERVAL_SECONDS"),
    ("Output and journal", "Events of tool calls", "model.fixed_limits.TOOL_CALL_EVENTS_MAX"),
    ("Output and journal", "Text of a conversation event", "model.fixed_limits.CONVERSATION_TEXT_CHARACTERS_MAX"),
    ("Output and journal", "`final_message` in the status", "model.fixed_limits.FINAL_MESSAGE_CHARACTERS_MAX"),
    ("Output and journal", "Conversation events of a task", "model.fixed_limits.CONVERSATION_BYTES_MAX"),
    ("Sandboxes", "Processes and threads", "model.fixed_limits.SANDBOX_PROCESSES_MAX"),
    ("Sandboxes", "Open files of one process", "runtimes.programs.inherited_limits.OPEN_FILES_MAX"),
    ("Sandboxes", "Open files of all processes", "model.fixed_limits.OPEN_FILES_OF_SANDBOX_MAX"),
    ("Sandboxes", "Open directories", "model.fixed_limits.OPEN_DIRECTORIES_MAX"),
    ("Sandboxes", "Files and directories on the disk", "model.fixed_limits.DISK_FILES_MAX"),
    ("Sandboxes", "Directories on the disk", "model.fixed_limits.DISK_DIRECTORIES_MAX"),
    ("Sandboxes", "Sockets", "model.fixed_limits.SOCKETS_MAX"),
    ("Sandboxes", "UDP sockets on one port", "model.fixed_limits.UDP_SOCKETS_ON_PORT_MAX"),
    ("Sandboxes", "Locks on files", "model.fixed_limits.FILE_LOCKS_MAX"),
    ("Sandboxes", "Locks on devices and system files", "model.fixed_limits.LOCKS_ON_HOST_FILES_MAX"),
    (
        "Sandboxes",
        "Cached names of files, including hard links and names that do not exist",
        "model.fixed_limits.DENTRIES_MAX",
    ),
    ("Sandboxes", "Processes that are killed for lack of memory", "model.fixed_limits.OOM_KILLS_MAX"),
    ("Sandboxes", "Pseudo-terminals", "runtimes.programs.launcher.PTYS_MAX"),
    ("Sandboxes", "Memory that must be available on the host", "model.fixed_limits.MEMORY_AVAILABLE_BYTES_MIN"),
    ("Sandboxes", "Start of the agent", "model.fixed_limits.AGENT_START_TIMEOUT_SECONDS"),
    ("Sandboxes", "Grace period after TERM", "model.fixed_limits.TERM_GRACE_SECONDS"),
    ("Sandboxes", "Removal of a sandbox", "model.fixed_limits.SANDBOX_TEARDOWN_SECONDS"),
    ("Gateway", "Headers of a request", "gateway.limits.HEAD_BYTES_MAX"),
    ("Gateway", "Body of a model request", "gateway.limits.REQUEST_BODY_BYTES_MAX"),
    (
        "Gateway",
        "Commas, colons and opening brackets in a model request",
        "gateway.limits.REQUEST_JSON_VALUES_MAX",
    ),
    (
        "Gateway",
        "Objects that the gateway checks in a model request",
        "agents.claude_code.messages_api.request_restrictions.REQUEST_OBJECTS_MAX",
    ),
    ("Gateway", "Integers of 300 or more digits in a model request", "gateway.limits.LONG_INTEGERS_MAX"),
    ("Gateway", "Connections to the model", "gateway.limits.CONNECTIONS_MAX"),
    (
        "Gateway",
        "Model requests in flight whose maximum cost exceeds the rest of the budget",
        "gateway.limits.IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK",
    ),
    ("Gateway", "Connection attempt to a host", "gateway.limits.CONNECT_TIMEOUT_SECONDS"),
    ("Gateway", "Silence of the model", "gateway.limits.UPSTREAM_TIMEOUT_SECONDS"),
    ("Gateway", "Interim responses (1xx) to a model request", "gateway.limits.INTERIM_RESPONSES_MAX"),
    ("Gateway", "Idle tunnel", "gateway.limits.TUNNEL_IDLE_TIMEOUT_SECONDS"),
    ("Gateway", "Host names that a task can resolve", "gateway.limits.SYNTHETIC_IPS_MAX"),
    ("Gateway", "Ports of `vm.allowed_hosts`", "model.egress.TRANSPARENT_PORTS_MAX"),
    ("Gateway", "Events of refused connections", "gateway.limits.DENIALS_REPORTED_MAX"),
    ("Gateway", "Refusals reported per second", "gateway.limits.REPORTED_DENIALS_PER_SECOND_MAX"),
    ("Gateway", "CPU of the runner for the sandbox's traffic", "model.fixed_limits.RUNNER_CPU_CORES"),
    ("Secrets", "Value of one secret", "secrets.limits.SECRET_VALUE_BYTES_MAX"),
    ("Secrets", "Values of all secrets of a task", "secrets.limits.TASK_SECRETS_BYTES_MAX"),
    ("Secrets", "Shortest value that is redacted", "secrets.limits.REDACTED_VALUE_CHARACTERS_MIN"),
    ("Secrets", "Request to Vault", "secrets.limits.VAULT_TIMEOUT_SECONDS"),
    ("Artifacts and patches", "Patch", "model.fixed_limits.PATCH_BYTES_MAX"),
    ("Artifacts and patches", "`TASK_ID.changes.tar`", "model.fixed_limits.CHANGED_FILES_TAR_BYTES_MAX"),
    (
        "Artifacts and patches",
        "Size of the files that match the artifact patterns",
        "model.fixed_limits.MATCHED_FILES_BYTES_MAX",
    ),
    ("Artifacts and patches", "Number of files that match the artifact patterns", "workspace.artifacts.ARTIFACTS_MAX"),
    (
        "Artifacts and patches",
        "Paths of the files that match the artifact patterns",
        "workspace.artifacts.ARTIFACT_PATHS_BYTES_MAX",
    ),
    ("Artifacts and patches", "Files and directories in a commit", "workspace.rooted_files.ENTRIES_MAX"),
    ("Artifacts and patches", "Number of patches in a chain of tasks", "model.fixed_limits.EARLIER_PATCHES_MAX"),
    (
        "Artifacts and patches",
        "Size of the patches in a chain of tasks",
        "model.fixed_limits.EARLIER_PATCHES_BYTES_MAX",
    ),
    ("Artifacts and patches", "Session of an agent", "model.fixed_limits.AGENT_SESSION_BYTES_MAX"),
    (
        "Artifacts and patches",
        "Earlier conversation as text",
        "model.fixed_limits.EARLIER_CONVERSATION_CHARACTERS_MAX",
    ),
    (
        "Artifacts and patches",
        "Events that are searched for the earlier conversation",
        "model.fixed_limits.EARLIER_CONVERSATION_EVENTS_MAX",
    ),
    (
        "Artifacts and patches",
        "`.gitignore` files in a commit and their directories",
        "workspace.diff.base_tree.IGNORE_ENTRIES_MAX",
    ),
    (
        "Retries and waiting",
        "Attempts in a row that fail before the agent starts",
        "model.fixed_limits.UNSTARTED_ATTEMPTS_MAX",
    ),
    ("Retries and waiting", "Resumes of an agent", "model.fixed_limits.RESUMES_MAX"),
    ("Retries and waiting", "First pause before a retry", "model.fixed_limits.RETRY_BACKOFF_SECONDS"),
    ("Retries and waiting", "Longest pause before a retry", "model.fixed_limits.RETRY_BACKOFF_SECONDS_MAX"),
    (
        "Retries and waiting",
        "Silence of a runner before the server checks it",
        "model.fixed_limits.RUNNER_SILENCE_SECONDS",
    ),
    (
        "Retries and waiting",
        "Cancellation while the runner starts or its journal is read",
        "model.fixed_limits.CANCEL_TIMEOUT_SECONDS",
    ),
    ("Retries and waiting", "Younger tasks that may overtake a waiting one", "model.fixed_limits.QUEUE_OVERTAKES_MAX"),
    ("Retries and waiting", "Unfinished tasks", "model.fixed_limits.UNFINISHED_TASKS_MAX"),
    ("Retries and waiting", "Manifests of unfinished tasks", "model.fixed_limits.UNFINISHED_MANIFEST_BYTES_MAX"),
    ("Retries and waiting", "Lifetime of an `Idempotency-Key`", "model.fixed_limits.IDEMPOTENCY_SECONDS"),
    (
        "Retries and waiting",
        "Age at which a finished journal is compressed",
        "model.fixed_limits.JOURNAL_COMPRESSION_DELAY_SECONDS",
    ),
    ("Server", "`limit` of a list", "api.routes.tasks.LIMIT_MAX"),
    ("Server", "`timeout` of a wait", "api.routes.tasks.WAIT_SECONDS_MAX"),
    ("Server", "`tail` of logs", "api.routes.logs.TAIL_MAX"),
    ("Server", "`Idempotency-Key`", "api.routes.submission.IDEMPOTENCY_KEY_LENGTH_MAX"),
    ("Server", "`reason` of a cancellation", "model.wire.request_bodies.REASON_LENGTH_MAX"),
    ("Server", "Headers of a request", "api.http.request_framing.HEAD_BYTES_MAX"),
    ("Server", "Header fields of a request", "api.http.request_framing.FIELDS_MAX"),
    (
        "Server",
        "Connections without a valid token",
        "api.http.connections.UNAUTHENTICATED_CONNECTIONS_MAX",
    ),
    ("Server", "Threads that read for one token", "primitives.fair_client_shares.CONCURRENT_THREADS_MAX"),
    ("Server", "Requests of one token at once", "api.client_limits.CONCURRENT_REQUESTS_MAX"),
    ("Server", "Streams with the events of all tasks, for one token", "api.client_limits.ALL_TASKS_STREAMS_MAX"),
    ("Server", "Memory of the responses to one token", "primitives.fair_client_shares.RESPONSES_BYTES_MAX"),
    ("Server", "Time in which a client reads nothing of a response", "api.http.connections.STALL_TIMEOUT_SECONDS"),
    ("Server", "Session of a browser", "api.authentication.SESSION_SECONDS"),
    ("Server", "Events of all tasks that wait for a slow subscriber", "model.fixed_limits.SUBSCRIBER_EVENTS_MAX"),
    ("Server", "Terminals of a sandbox", "model.fixed_limits.TERMINAL_CLIENTS_MAX"),
    ("Workers", "One record of the journal", "model.fixed_limits.WORKER_RECORD_BYTES_MAX"),
    ("Workers", "One record without output", "model.fixed_limits.WORKER_SMALL_RECORD_BYTES_MAX"),
    ("Workers", "Values in the agent's own report", "model.fixed_limits.WORKER_RECORD_VALUES_MAX"),
    ("Workers", "Records of artifacts", "model.fixed_limits.WORKER_ARTIFACT_RECORDS_BYTES_MAX"),
    ("Workers", "Number of artifacts", "model.fixed_limits.WORKER_ARTIFACTS_MAX"),
    ("Workers", "Size of all artifacts", "placements.cluster.file_transfers.ARTIFACTS_BYTES_MAX"),
    ("Workers", "Journal", "placements.cluster.worker_server.JOURNAL_BYTES_MAX"),
    (
        "Workers",
        "Connections without a valid token",
        "placements.cluster.worker_server.UNAUTHENTICATED_CONNECTIONS_MAX",
    ),
    (
        "Workers",
        "Images that the server sends at once",
        "placements.cluster.file_transfers.TRANSFERS_MAX",
    ),
    ("Workers", "Free space on a host in addition to a new image", "model.fixed_limits.OUTPUT_FREE_BYTES"),
]

DASHBOARD_SECTION = "Dashboard"
DASHBOARD_ROWS = {
    "Entries in a conversation": "conversation.js:ENTRIES_MAX",
    "Characters in a conversation": "conversation.js:CHARACTERS_MAX",
    "Steps of a subagent": "conversation.js:SUBAGENT_ENTRIES_MAX",
    "Characters in a message": "markdown.js:LENGTH_MAX",
    "Elements in a message": "markdown.js:ELEMENTS_MAX",
    "Nesting depth of a message": "markdown.js:DEPTH_MAX",
    "Characters in a paragraph": "untrusted_text.js:TEXT_LENGTH_MAX",
    "Lines of output": "output.js:LINES_MAX",
    "Characters of output": "output.js:CHARACTERS_MAX",
    "Characters of JSON in a line of output": "output_line.js:JSON_CHARACTERS_MAX",
    "Patch": "changes.js:BYTES_MAX",
    "Files in a patch": "changes.js:FILES_SHOWN_MAX",
    "Characters in a line of a patch": "diff_lines.js:LINE_CHARACTERS_MAX",
    "Lines in a file that is expanded at first": "diff_file.js:LINES_OPENED_MAX",
    "Characters in a highlighted file": "syntax.js:CHARACTERS_MAX",
    "Characters in a line of a highlighted file": "syntax.js:LINE_CHARACTERS_MAX",
    "Highlighting of a file": "syntax.js:REPLY_MILLISECONDS_MAX",
}
"""The dashboard's limits, with the script and the constant that define each."""


def format_value(name: str, value: float) -> str:
    if "_BYTES" in name:
        for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
            if value % size == 0:
                return f"{int(value) // size} {unit}" + (" per second" if name.endswith("PER_SECOND") else "")
        return f"{value} bytes"
    if "_SECONDS" in name:
        for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if value % size == 0:
                count = int(value) // size
                return f"{count} {unit}{'s' if count != 1 else ''}"
        return f"{value:.15g} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.15g}"


def documented(root: Path) -> dict[tuple[str, str], str]:
    """Return the values in docs/limits.md, keyed by section and limit."""
    values: dict[tuple[str, str], str] = {}
    section = ""
    for line in (root / "docs" / "limits.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif section and line.startswith("| ") and not line.startswith(("| limit ", "| --- ")):
            limit, value, effect = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            assert effect.endswith(".")
            values[section, limit] = value
    return values


def test_each_row_of_the_page_has_a_constant(root: Path):
    dashboard_rows = [(DASHBOARD_SECTION, limit) for limit in DASHBOARD_ROWS]
    assert list(documented(root)) == [*((section, limit) for section, limit, _ in ROWS), *dashboard_rows]


@pytest.mark.parametrize(("section", "limit", "constant"), ROWS)
def test_page_states_the_value_of_the_constant(root: Path, section: str, limit: str, constant: str):
    module, _, name = constant.rpartition(".")
    value = getattr(importlib.import_module(f"sandbox.{module}"), name)
    assert documented(root)[section, limit] == format_value(name, value)


@pytest.mark.parametrize(("limit", "constant"), DASHBOARD_ROWS.items())
def test_page_states_the_value_of_the_dashboard_constant(root: Path, limit: str, constant: str):
    script, _, name = constant.partition(":")
    text = (root / "src" / "sandbox" / "dashboard" / "assets" / script).read_text()
    (factors,) = re.findall(rf"^(?:export )?const {name} = ([\d_* ]+);", text, re.MULTILINE)
    value = math.prod(int(factor) for factor in factors.split("*"))
    if name.endswith("_MILLISECONDS_MAX"):
        name, value = name.replace("_MILLISECONDS", "_SECONDS"), value // 1000
    assert documented(root)[DASHBOARD_SECTION, limit] == format_value(f"_{name}", value)
