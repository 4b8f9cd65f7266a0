"""Describes a task's failure for people: what happened, why, and what to do."""

import re
from dataclasses import dataclass

from sandbox.model.failure import FailureCode
from sandbox.model.wire.bodies import FailureBody


@dataclass(frozen=True, slots=True)
class FailureNotice:
    """A failure. title: what happened; remedy: what to do, empty if the message already says it.

    setting: the manifest field to change so that the failure does not occur again; None if there is none.
    """

    title: str
    message: str
    remedy: str
    code: str
    setting: str | None = None

    @property
    def change(self) -> str:
        """The change to the setting, as in "Run again with more memory"; empty without a setting."""
        return _CHANGES.get(self.setting or "", "")

    @property
    def summary(self) -> str:
        """The message for one line of a list, without a beginning that repeats the repository's URL."""
        if self.code != FailureCode.CLONE_FAILED:
            return self.message
        text = _CLONE_PREFIX.sub("", self.message)
        return text[:1].upper() + text[1:]


_CLONE_PREFIX = re.compile(r"^Cannot clone \S+: (?=.)", re.DOTALL)
_AGAIN = "Run the task again."
_NOTICES: dict[str, tuple[str, str]] = {
    FailureCode.AGENT_FAILED: ("The agent failed", "Read the end of the conversation and the output."),
    FailureCode.AGENT_NO_RESULT: ("The agent ended without a result", "Read the output."),
    FailureCode.AGENT_NOT_OFFERED: ("This server does not have the agent", "Run the task on a server that has it."),
    FailureCode.BUDGET_EXCEEDED: ("The budget is used up", "Raise the budget, or make the task smaller."),
    FailureCode.CLONE_FAILED: (
        "The repository could not be cloned",
        "Check the URL, the branch, the commit, and the server's access to the repository.",
    ),
    FailureCode.COLLECT_FAILED: ("The results could not be collected", _AGAIN),
    FailureCode.DISK_FULL: ("The disk was full", "Raise vm.disk."),
    FailureCode.HANG: ("The agent produced no output", "Raise lifecycle.hang_timeout for tasks without output."),
    FailureCode.HOST_LOST: ("The machine was restarted", _AGAIN),
    FailureCode.INTERNAL: ("Sandbox failed", "Report this, with the runner's log."),
    FailureCode.MCP_FAILED: ("An MCP server did not connect", "Read the output, and check the server's entry."),
    FailureCode.OUT_OF_MEMORY: ("The sandbox ran out of memory", "Raise vm.memory."),
    FailureCode.PROCESS_LIMIT: ("The sandbox ran out of processes", "Let the agent start fewer at the same time."),
    FailureCode.PROVISION_FAILED: ("The sandbox could not be created", "Run `sandbox doctor` on the server."),
    FailureCode.PROVISION_TIMEOUT: ("Creating the sandbox took too long", "Raise lifecycle.provision_timeout."),
    FailureCode.RUNNER_LOST: ("The task's runner died", _AGAIN),
    FailureCode.SANDBOX_LOST: ("The sandbox ended unexpectedly", _AGAIN),
    FailureCode.SECRET_UNAVAILABLE: ("A secret is unavailable", "Check the secret's source on the server."),
    FailureCode.STAGE_TIMEOUT: ("Cloning took too long", "Raise lifecycle.stage_timeout."),
    FailureCode.TIMEOUT: ("The agent ran out of time", "Raise lifecycle.timeout, or make the task smaller."),
    FailureCode.TOOL_UNKNOWN: ("The agent does not have an allowed tool", "Fix its name in allowed_tools."),
}
_CHANGES = {
    "lifecycle.budget_tokens": "a larger budget",
    "lifecycle.budget_usd": "a larger budget",
    "lifecycle.timeout": "more time",
    "repository.branch": "another branch",
    "repository.url": "another URL",
    "vm.disk": "a larger disk",
    "vm.memory": "more memory",
}
_SETTING = re.compile(r"(?<![\w.])(?:" + "|".join(map(re.escape, _CHANGES)) + r")(?!\w|\.\w)")
_CODES_WITH_SETTING = {
    FailureCode.BUDGET_EXCEEDED,
    FailureCode.CLONE_FAILED,
    FailureCode.DISK_FULL,
    FailureCode.OUT_OF_MEMORY,
    FailureCode.TIMEOUT,
}
"""Failures whose messages come from Sandbox and name a setting last, or whose remedies name one."""

_REMEDY_MARKS = ("; ", "Run the task again", "Submit the task again", "please report")
"""Messages that contain one of these texts already say what to do, often more precisely."""


def describe_failure(failure: FailureBody) -> FailureNotice:
    """Return the notice for a failure. Unknown codes from other versions get a general title."""
    title, remedy = _NOTICES.get(failure["code"], ("The task failed", ""))
    message = failure["message"]
    names = _SETTING.findall(message) or _SETTING.findall(remedy)
    setting = names[-1] if names and failure["code"] in _CODES_WITH_SETTING else None
    if any(mark in message for mark in _REMEDY_MARKS):
        remedy = ""
    return FailureNotice(title, message, remedy, failure["code"], setting)
