"""Derived tasks, which start where an earlier task started (a rerun) or ended (a continuation).

Plans the tasks, and stores what they inherit before they are recorded. A continuation inherits
changes, and the agent's session or the conversation as text.
"""

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import stat
from collections import deque
from pathlib import Path

import msgspec

from sandbox.interfaces.server_services import (
    DerivedTaskPlan,
    Inheritance,
    TaskEvents,
    TaskNotContinuableError,
    TaskNotEndedError,
    TaskQueries,
)
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.artifacts import AGENT_SESSION_ARTIFACT, GENERATED_DIRECTORY, Artifact
from sandbox.model.events import Parent
from sandbox.model.fixed_limits import (
    EARLIER_CONVERSATION_CHARACTERS_MAX,
    EARLIER_CONVERSATION_EVENTS_MAX,
    EARLIER_PATCHES_BYTES_MAX,
    EARLIER_PATCHES_MAX,
)
from sandbox.model.task import Task
from sandbox.model.wire.event_bodies import ConversationItem
from sandbox.model.wire.event_conversion import WireEvent
from sandbox.primitives import fair_client_shares
from sandbox.primitives.files import create_private_file, fsync_path

INHERITED_PREFIX = "inherited-"
"""The names of all files that a task takes over begin with this prefix."""

_CANNOT_LINK = frozenset({errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV})
"""Errors of link(2) if the file has too many links, or is on another file system or one that does not support links."""


class FileChangedError(OSError):
    """A file of the earlier task does not match that task's journal."""


def store_inheritance(layout: TaskLayout, inheritance: Inheritance) -> None:
    """Link or write all files into the directory of the new task's artifacts, and flush the directory.

    Stored artifacts never change, so the tasks share them: a link needs no disk space, and the file remains when the
    earlier task is removed. A file that cannot have another link is copied. The runner compares the checksum before it
    uses a file. The caller holds the lock of the new task's journal, which has no record yet. Raises OSError.
    """
    discard_inheritance(layout)
    layout.artifacts.mkdir(mode=0o700)
    for artifact in inheritance.parent.files:
        path = layout.artifacts / artifact.name
        source = inheritance.sources.get(artifact.name)
        if source is None:
            with create_private_file(path) as file:
                file.write(inheritance.conversation)
            fsync_path(path)
        else:
            _link_or_copy(source, path, artifact.size_bytes)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != artifact.size_bytes:
            raise FileChangedError(f"{source or artifact.name} is not a regular file of the recorded size")
    fsync_path(layout.artifacts)
    fsync_path(layout.root)


def _link_or_copy(source: Path, path: Path, size_bytes: int) -> None:
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        _copy(source, path, size_bytes)


def _copy(source: Path, path: Path, size_bytes: int) -> None:
    """Copy a regular file of this size and flush the copy. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(source, flags), "rb") as file, create_private_file(path) as copy:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            raise FileChangedError(f"{source} is not a regular file of the recorded size")
        shutil.copyfileobj(file, copy)
    fsync_path(path)


def discard_inheritance(layout: TaskLayout) -> None:
    """Remove the files of a task that was not recorded."""
    shutil.rmtree(layout.artifacts, ignore_errors=True)


def has_own_artifacts(layout: TaskLayout) -> bool:
    """Return whether a task has stored files that it has not taken over from another task. Raises OSError."""
    try:
        return any(not path.name.startswith(INHERITED_PREFIX) for path in layout.artifacts.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


_PROMPT_CHARACTERS_MAX = 20_000
_MESSAGE_CHARACTERS_MAX = 8_000
_OUTPUT_CHARACTERS_MAX = 600
_SUMMARY_CHARACTERS_MAX = 300
_SUBAGENT_CALLS_MAX = 10_000
"""Maximum number of subagents' calls whose results are left out. Beyond that, the oldest call is forgotten."""
_SEPARATOR = "\n\n"
_INDENT = "  "
OMISSION_NOTE = "[The beginning of the conversation is omitted.]"


class ConversationText:
    """Renders the conversation of one or more tasks as text, for the agent of the next task in the chain.

    Entries are added oldest first; the beginning is dropped if the text is too long.

    All lines of an entry except the first are indented, so the output of a tool cannot look like another entry.
    """

    def __init__(self, characters_max: int = EARLIER_CONVERSATION_CHARACTERS_MAX) -> None:
        self._characters_max = characters_max
        self._entries: deque[str] = deque()
        self._characters = 0
        self._is_cut = False
        self._subagent_calls: dict[str, None] = {}
        """Ids of calls without a result, oldest first."""

    def add_earlier(self, text: str) -> None:
        """Add a text that `render` returned for an earlier task."""
        if text:
            self._is_cut = self._is_cut or text.startswith(OMISSION_NOTE)
            for entry in text.removeprefix(OMISSION_NOTE).split(_SEPARATOR):
                self._append(entry)

    def add_prompt(self, prompt: str) -> None:
        """Add the prompt of a task."""
        self._add(f"User: {_shorten(prompt, _PROMPT_CHARACTERS_MAX)}")

    def add_event(self, event: WireEvent) -> None:
        """Add an event. The conversations of subagents are left out."""
        match event["type"]:
            case "agent_message" | "tool_call_started" | "tool_result" | "agent_result":
                self._add_item(event)
            case "output" | "conversation":
                # Earlier versions recorded no conversation events, so these items were converted from the output.
                for item in event.get("conversation", ()):
                    self._add_item(item)

    def render(self) -> str:
        """Return the text. It begins with OMISSION_NOTE only if something was left out."""
        text = _SEPARATOR.join(self._entries)
        is_cut = self._is_cut or len(text) > self._characters_max
        return _SEPARATOR.join([*([OMISSION_NOTE] if is_cut else ()), text[-self._characters_max :]])

    def _add_item(self, item: ConversationItem) -> None:
        if item["type"] == "agent_message":
            if item["kind"] == "text" and item["parent_tool_use_id"] is None:
                self._add(f"Assistant: {_shorten(item['text'], _MESSAGE_CHARACTERS_MAX)}")
        elif item["type"] == "tool_call_started":
            if item["parent_tool_use_id"] is None:
                self._add(f"Tool call: {item['tool']} {_shorten(item['summary'], _SUMMARY_CHARACTERS_MAX)}".rstrip())
            else:
                self._add_subagent_call(item["tool_use_id"])
        elif item["type"] == "tool_result":
            if item["tool_use_id"] in self._subagent_calls:
                del self._subagent_calls[item["tool_use_id"]]
                return
            mark = "Tool error" if item["is_error"] else "Tool result"
            self._add(f"{mark}: {_shorten(item['output'], _OUTPUT_CHARACTERS_MAX)}".rstrip())

    def _add_subagent_call(self, tool_use_id: str) -> None:
        if len(self._subagent_calls) >= _SUBAGENT_CALLS_MAX:
            del self._subagent_calls[next(iter(self._subagent_calls))]
        self._subagent_calls[tool_use_id] = None

    def _add(self, entry: str) -> None:
        self._append(f"\n{_INDENT}".join(entry.splitlines()))

    def _append(self, entry: str) -> None:
        if not entry.strip():
            return
        self._entries.append(entry)
        self._characters += len(entry) + len(_SEPARATOR)
        while self._characters > self._characters_max and len(self._entries) > 1:
            self._characters -= len(self._entries.popleft()) + len(_SEPARATOR)
            self._is_cut = True


def _shorten(text: str, characters_max: int) -> str:
    if len(text) <= characters_max:
        return text
    half = characters_max // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters omitted …]\n{text[-half:]}"


_CONVERSATION_NAME = f"{INHERITED_PREFIX}conversation.txt"
_SESSION_COPY_NAME = f"{INHERITED_PREFIX}{AGENT_SESSION_ARTIFACT}"
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.IGNORECASE)
_APPLY_ADVICE = "Apply its patch, push the result, and submit a new task."


class DerivedTaskPlanner:
    """Implements `interfaces.server_services.DerivedTaskPlanner`."""

    def __init__(self, data_dir: Path, queries: TaskQueries, events: TaskEvents) -> None:
        self._data_dir = data_dir
        self._queries = queries
        self._events = events

    async def plan_rerun(self, task_id: str) -> DerivedTaskPlan:
        """See `interfaces.server_services.DerivedTaskPlanner.plan_rerun`."""
        task = await self._queries.status(task_id)
        if task.parent is None:
            return DerivedTaskPlan(task.manifest, None)
        directory = TaskLayout(self._data_dir, task.id).artifacts
        sources = {artifact.name: directory / artifact.name for artifact in task.parent.files}
        return DerivedTaskPlan(task.manifest, Inheritance(task.parent, sources))

    async def plan_continuation(self, task_id: str) -> DerivedTaskPlan:
        """See `interfaces.server_services.DerivedTaskPlanner.plan_continuation`."""
        task = await self._queries.status(task_id)
        if not task.state.is_final:
            raise TaskNotEndedError(task, "continue")
        try:
            plan = await self._plan_continuation(task)
        except TaskNotContinuableError:
            await self._check_not_deleted(task)
            raise
        await self._check_not_deleted(task)
        return plan

    async def _check_not_deleted(self, task: Task) -> None:
        """Raise TaskNotFoundError if the task was deleted, because a plan made in the meantime may lack its events."""
        await self._queries.status(task.id)

    async def _plan_continuation(self, task: Task) -> DerivedTaskPlan:
        inheritance = await fair_client_shares.to_thread(_inherit_files, TaskLayout(self._data_dir, task.id), task)
        conversation = (await self._read_conversation(task)).encode(errors="replace")
        artifact = _new_artifact(_CONVERSATION_NAME, "text/plain", conversation)
        parent = msgspec.structs.replace(inheritance.parent, conversation=artifact)
        repository = dataclasses.replace(task.manifest.repository, commit=_chain_start_commit(task))
        manifest = task.manifest.replace(repository=repository)
        return DerivedTaskPlan(manifest, Inheritance(parent, inheritance.sources, conversation))

    async def continuation_refusal(self, task: Task) -> str | None:
        """See `interfaces.server_services.DerivedTaskPlanner.continuation_refusal`."""
        try:
            await fair_client_shares.to_thread(_inherit_files, TaskLayout(self._data_dir, task.id), task)
        except TaskNotContinuableError as error:
            return error.message
        return None

    async def _read_conversation(self, task: Task) -> str:
        """Return the conversation of the chain, including this task, within the limits."""
        text = ConversationText()
        if task.parent is not None and task.parent.conversation is not None:
            earlier = TaskLayout(self._data_dir, task.id).artifacts / task.parent.conversation.name
            text.add_earlier(await fair_client_shares.to_thread(_read_text, earlier))
        text.add_prompt(task.manifest.agent.prompt)
        after = max(0, task.last_seq - EARLIER_CONVERSATION_EVENTS_MAX)
        async for event in self._events.recorded_events(task.id, after=after):
            text.add_event(event)
        return text.render()


def _inherit_files(layout: TaskLayout, task: Task) -> Inheritance:
    """Return everything that a continuation of the task takes over, except the conversation.

    Raises TaskNotContinuableError.
    """
    own_patch = _find_complete_patch(layout, task)
    _chain_start_commit(task)
    if (base_commit := task.base_commit) is None:
        raise TaskNotContinuableError(task.id, "its repository was never cloned")
    earlier = task.parent
    sources = {} if earlier is None else {one.name: layout.artifacts / one.name for one in earlier.patches}
    patches = () if earlier is None else earlier.patches
    if own_patch is not None:
        name = f"{INHERITED_PREFIX}{len(patches) + 1}.patch"
        sources[name] = layout.artifacts / own_patch.name
        patches = (*patches, _inherited_artifact(own_patch, name))
    if len(patches) > EARLIER_PATCHES_MAX or sum(patch.size_bytes for patch in patches) > EARLIER_PATCHES_BYTES_MAX:
        limits = f"{EARLIER_PATCHES_MAX} patches and {EARLIER_PATCHES_BYTES_MAX // 1024**2} MiB in total"
        raise TaskNotContinuableError(task.id, f"its chain exceeds the limit of {limits}", _APPLY_ADVICE)
    session_id = task.attempt.session_id if task.attempt is not None else None
    kept = next((artifact for artifact in task.artifacts if artifact.name == AGENT_SESSION_ARTIFACT), None)
    session = None
    if kept is not None and kept.is_internal and session_id is not None and (layout.artifacts / kept.name).is_file():
        session = _inherited_artifact(kept, _SESSION_COPY_NAME)
        sources[session.name] = layout.artifacts / kept.name
    chain_base_commit = base_commit if earlier is None else earlier.chain_base_commit
    parent = Parent(task.id, chain_base_commit, patches, None, session_id if session is not None else None, session)
    return Inheritance(parent, sources)


def _find_complete_patch(layout: TaskLayout, task: Task) -> Artifact | None:
    """Return the task's patch; None if it changes nothing. Raises TaskNotContinuableError."""
    patch = next((one for one in task.artifacts if one.name == f"{task.id}.patch" and one.is_generated), None)
    if patch is None:
        raise TaskNotContinuableError(task.id, "it ended without a patch")
    if patch.contains_secret:
        raise TaskNotContinuableError(task.id, "its patch contains the value of a secret")
    if any(one.name == f"{task.id}.changes.tar" and one.is_generated for one in task.artifacts):
        raise TaskNotContinuableError(task.id, "its patch is incomplete", _APPLY_ADVICE)
    has_changes = False
    try:
        with (layout.artifacts / patch.name).open("rb") as file:
            # The file begins with comments. Each names a path that is not in the patch, or says why the patch is empty.
            while line := file.readline(_LINE_BYTES_MAX):
                if line.startswith(_INCOMPLETE_MARKS):
                    raise TaskNotContinuableError(task.id, "its patch is incomplete", _APPLY_ADVICE)
                if not line.startswith(b"#"):
                    has_changes = True
                    break
    except OSError as error:
        reason = f"its patch cannot be read ({error.strerror})"
        advice = "Restore the patch from a backup, or submit the task again."
        raise TaskNotContinuableError(task.id, reason, advice) from error
    return patch if has_changes else None


_LINE_BYTES_MAX = 64 * 1024
_INCOMPLETE_MARKS = (b"# truncated: ", b"# skipped, too large for a patch: ")


def _chain_start_commit(task: Task) -> str:
    """Return the commit of the remote repository that this task's chain started from.

    Raises TaskNotContinuableError.
    """
    repository = task.manifest.repository
    if task.parent is not None and repository.commit is not None:
        return repository.commit
    if repository.patch is None and task.base_commit is not None:
        return task.base_commit
    if repository.commit is not None and _FULL_COMMIT.fullmatch(repository.commit):
        return repository.commit.lower()
    if task.base_commit is None:
        raise TaskNotContinuableError(task.id, "its repository was never cloned")
    reason = "its manifest has a patch and no full repository.commit, so the commit that it applies to is unknown"
    raise TaskNotContinuableError(task.id, reason, "Submit the task again with repository.commit.")


def _inherited_artifact(artifact: Artifact, name: str) -> Artifact:
    return Artifact(
        name, f"{GENERATED_DIRECTORY}/{name}", artifact.size_bytes, artifact.content_type, artifact.checksum,
        is_internal=True,
    )  # fmt: skip


def _new_artifact(name: str, content_type: str, content: bytes) -> Artifact:
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Artifact(name, f"{GENERATED_DIRECTORY}/{name}", len(content), content_type, checksum, is_internal=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
