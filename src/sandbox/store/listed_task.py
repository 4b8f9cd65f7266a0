"""Decodes a task as lists show it, without the data that lists omit."""

import dataclasses
from typing import Any, get_type_hints

import msgspec

from sandbox.model.manifest.schema import AgentSection, CommonFields, Manifest, Repository
from sandbox.model.task import Task, final_message_in_result


class _AgentResult(msgspec.Struct, frozen=True):
    """The only field of an agent's own report that is needed for lists.

    A completely decoded report can use megabytes.
    """

    result: Any = None


def _declare_listed_task() -> type[Any]:
    """Declare a `Task` whose fields have the types that lists need.

    msgspec decodes its manifest without a hook, because the manifest has no agent section. What lists omit is not
    decoded.
    """
    types = get_type_hints(CommonFields)
    sections = [(each.name, types[each.name], _default_of(each)) for each in dataclasses.fields(CommonFields)]
    manifest = msgspec.defstruct("_ListedManifest", sections, frozen=True)
    listed_types = {"manifest": manifest, "result": msgspec.Raw, "artifacts": msgspec.Raw}
    declared = [
        (each.name, listed_types[each.name], _default_of(each, each.encode_name))
        for each in msgspec.structs.fields(Task)
        if each.name in listed_types
    ]
    methods = {"__eq__": _is_equal_task, "__ne__": lambda task, other: not _is_equal_task(task, other)}
    return msgspec.defstruct("_ListedTask", declared, bases=(Task,), namespace=methods, frozen=True)


def _is_equal_task(task: Task, other: object) -> bool:
    """Compare like `Task`, whose own comparison requires the same class."""
    return isinstance(other, Task) and msgspec.structs.astuple(task) == msgspec.structs.astuple(other)


def _default_of(field: msgspec.structs.FieldInfo | dataclasses.Field[Any], encoded_name: str | None = None) -> Any:
    defaults = {"default": field.default, "default_factory": field.default_factory}
    missing = (msgspec.NODEFAULT, dataclasses.MISSING)
    return msgspec.field(name=encoded_name, **{name: value for name, value in defaults.items() if value not in missing})


_list_decoder = msgspec.json.Decoder(_declare_listed_task())
_agent_result_decoder = msgspec.json.Decoder(_AgentResult)
EMPTY_AGENT_SECTION = AgentSection("", {"prompt": "", "model": ""})
"""Replaces the agent section of each manifest in a list, because lists omit that section."""


def decode_task_item(encoded: bytes) -> Task:
    """Decode a task as lists show it: without its artifacts, patch, agent section and the agent's own report."""
    listed = _list_decoder.decode(encoded)
    manifest = Manifest.combine(listed.manifest, EMPTY_AGENT_SECTION)
    if manifest.repository.patch is not None:  # rows of earlier versions contain the patch
        manifest = manifest.replace(repository=without_patch(manifest.repository))
    # Nothing else refers to the new task. A copy would take four times as long.
    set_field = msgspec.structs.force_setattr
    set_field(listed, "manifest", manifest)
    if listed.result is not None:
        if listed.final_message is None:
            message = final_message_in_result(_agent_result_decoder.decode(listed.result).result)
            set_field(listed, "final_message", message)
        set_field(listed, "result", None)
    if listed.artifacts:
        set_field(listed, "artifacts", ())
    task: Task = listed
    return task


def without_patch(repository: Repository) -> Repository:
    """Return the repository without its patch."""
    return repository if repository.patch is None else dataclasses.replace(repository, patch=None)
