"""Describes a task's failure to users: what happened, why, and what to do."""

import re
from dataclasses import dataclass

from sandbox.model.display_text import format_budget
from sandbox.model.failure import FailureCode, FailureReason
from sandbox.model.wire.task_bodies import FailureBody


@dataclass(frozen=True, slots=True)
class FailureNotice:
    """A failure, described in the words of the submission form instead of the manifest's field names.

    title: what happened; detail: the cause, empty if the title contains it; remedy: what to do, empty if the detail
    already says it. message: the message in the task's status.
    field: the field of the manifest to change, from the remedy in the status; None if the remedy has no known field.
    """

    title: str
    detail: str
    remedy: str
    code: str
    message: str
    field: str | None = None

    @property
    def new_value_words(self) -> str:
        """The new value of the field in words, as in "Run again with more memory"; empty without a field."""
        words = _find_words(self.field) if self.field else None
        return words[1] if words else ""

    @property
    def overspending_note(self) -> str:
        """Why the task cost more than its budget; empty for other failures."""
        is_spent = self.code == FailureCode.BUDGET_EXCEEDED and _SPENT.match(self.message)
        return "The last response is billed in full, even if it exceeds the budget." if is_spent else ""

    @property
    def anchor(self) -> str:
        """The code's anchor in the error reference. `internal_error` is also an API error, so its anchor differs."""
        return "internal_error-task" if self.code == FailureCode.INTERNAL else self.code

    @property
    def summary(self) -> str:
        """The cause, for a list with one line per task."""
        return self.detail or f"{self.title}. {self.remedy}".rstrip()


_CLONE_PREFIX = re.compile(r"^Cannot clone \S+: (?=.)", re.DOTALL)
_PRONOUN = re.compile(r"^it ")
"""Matches the pronoun that refers to the URL in the message about a failed clone."""

_SPENT = re.compile(r"^lifecycle\.budget_(?:tokens \((?P<tokens>[^()]+)|usd \((?P<usd>[0-9.e+-]+) USD)\) is spent\b")
_SELF_EXPLANATORY_CODES = {
    FailureCode.DISK_FULL,
    FailureCode.HANG,
    FailureCode.HOST_LOST,
    FailureCode.OUT_OF_MEMORY,
    FailureCode.PROVISION_TIMEOUT,
    FailureCode.RUNNER_LOST,
    FailureCode.STAGE_TIMEOUT,
    FailureCode.TIMEOUT,
}
"""Failures with messages such as "Cloning took too long; raise the limit.", to which a title adds nothing."""

_RUN_AGAIN_REMEDY = "Run the task again."
_NOTICES: dict[str, tuple[str, str]] = {
    FailureCode.AGENT_FAILED: ("The agent failed", "Read the end of the conversation and the output."),
    FailureCode.AGENT_NO_RESULT: ("The agent ended without a result", "Read the output."),
    FailureCode.AGENT_NOT_OFFERED: ("This server does not have the agent", "Run the task on a server that has it."),
    FailureCode.BUDGET_EXCEEDED: ("The budget is used up", "Raise the budget, or make the task smaller."),
    FailureCode.CLONE_FAILED: (
        "The repository could not be cloned",
        "Check the URL, the branch, the commit, and the server's access to the repository.",
    ),
    FailureCode.COLLECT_FAILED: ("The results could not be collected", _RUN_AGAIN_REMEDY),
    FailureCode.DISK_FULL: ("The disk was full", "Raise vm.disk."),
    FailureCode.HANG: ("The agent produced no output", "Raise lifecycle.hang_timeout for tasks without output."),
    FailureCode.HOST_LOST: ("The machine was restarted", _RUN_AGAIN_REMEDY),
    FailureCode.INTERNAL: ("Sandbox failed", "Report this, with the runner's log."),
    FailureCode.MCP_FAILED: ("An MCP server did not connect", "Read the output, and check the server's entry."),
    FailureCode.OUT_OF_MEMORY: ("The sandbox ran out of memory", "Raise vm.memory."),
    FailureCode.PROCESS_LIMIT: ("The sandbox ran out of processes", "Let the agent start fewer at the same time."),
    FailureCode.PROVISION_FAILED: ("The sandbox could not be created", "Run `sandbox doctor` on the server."),
    FailureCode.PROVISION_TIMEOUT: ("Creating the sandbox took too long", "Raise lifecycle.provision_timeout."),
    FailureCode.RUNNER_LOST: ("The task's runner died", _RUN_AGAIN_REMEDY),
    FailureCode.SANDBOX_LOST: ("The sandbox ended unexpectedly", _RUN_AGAIN_REMEDY),
    FailureCode.SECRET_UNAVAILABLE: ("A secret is unavailable", "Check the secret's source on the server."),
    FailureCode.STAGE_TIMEOUT: ("Cloning took too long", "Raise lifecycle.stage_timeout."),
    FailureCode.TIMEOUT: ("The agent ran out of time", "Raise lifecycle.timeout, or make the task smaller."),
    FailureCode.TOOL_UNKNOWN: ("The agent does not have an allowed tool", "Fix its name in allowed_tools."),
}
_KERNEL_LIMIT_NOTICE = ("The sandbox reached a limit", "Let the agent use fewer of these resources.")
"""The notice for `out_of_memory` if more memory does not help. In this case, the message does not name `vm.memory`."""

_FIELD_WORDS = {
    "lifecycle.budget_tokens": ("the token budget", "a larger budget"),
    "lifecycle.budget_usd": ("the budget in USD", "a larger budget"),
    "lifecycle.collect_timeout": ("the collection timeout", "more time"),
    "lifecycle.hang_timeout": ("the hang timeout", "more time"),
    "lifecycle.provision_timeout": ("the provisioning timeout", "more time"),
    "lifecycle.stage_timeout": ("the cloning timeout", "more time"),
    "lifecycle.timeout": ("the timeout", "more time"),
    "repository.branch": ("the branch", "another branch"),
    "repository.url": ("the URL", "another URL"),
    "vm.disk": ("the disk size", "a larger disk"),
    "vm.memory": ("the memory", "more memory"),
}
"""The words for each field and for its new value. Other fields appear under their names in the manifest."""

_AGENT_FIELD_WORDS = {"max_turns": ("the maximum number of turns", "more turns")}
"""The same for the fields of an agent's section. The field names omit the key of the section."""

_FIELDS = (*map(re.escape, _FIELD_WORDS), *(rf"[a-z_]+\.{name}" for name in _AGENT_FIELD_WORDS))
_NAME = re.compile(r"(?<![\w.])(?:" + "|".join(_FIELDS) + r")(?!\w|\.\w)")

_REMEDY_MARKS = ("; ", "Run the task again", "Submit the task again", "please report")
"""A message that contains one of these phrases already says what to do, so the notice's remedy is left empty."""


def describe_failure(failure: FailureBody) -> FailureNotice:
    """Return the notice for a failure. Unknown codes from other versions get a general title."""
    code, message = failure["code"], failure["message"]
    title, remedy = _NOTICES.get(code, ("The task failed", ""))
    field = failure["remedy"]["field"] if failure["remedy"] else None
    if code == FailureCode.OUT_OF_MEMORY and field is None:
        title, remedy = _KERNEL_LIMIT_NOTICE
    detail = message
    is_self_explanatory = code in _SELF_EXPLANATORY_CODES or failure["reason"] == FailureReason.MAX_TURNS
    if is_self_explanatory and "; " in message:
        title, _, remedy = message.partition("; ")
        detail = ""
    elif code == FailureCode.BUDGET_EXCEEDED and (spent := _SPENT.match(message)):
        title, detail = f"The task used its budget of {_format_limit(spent)}", ""
    elif code == FailureCode.CLONE_FAILED:
        detail = _PRONOUN.sub("the repository ", _CLONE_PREFIX.sub("", message))
    if any(mark in detail for mark in _REMEDY_MARKS):
        remedy = ""
    if field is not None:
        title, detail, remedy = map(_use_words, (title, detail, remedy))
    known_field = field if field and _find_words(field) else None
    return FailureNotice(title, _capitalize(detail), _capitalize(remedy), code, message, known_field)


def field_words(field: str) -> str:
    """Return the words for a field, such as "the memory"; return the field itself if there are none."""
    words = _find_words(field)
    return words[0] if words else field


def _find_words(field: str) -> tuple[str, str] | None:
    return _FIELD_WORDS.get(field) or _AGENT_FIELD_WORDS.get(field.partition(".")[2])


def _format_limit(spent: re.Match[str]) -> str:
    return spent["tokens"] or format_budget(float(spent["usd"]))


def _use_words(text: str) -> str:
    return _NAME.sub(lambda name: field_words(name[0]), text)


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
