"""The manifest schema: records of a validated manifest.

`manifest.parser` reads types, bounds and `Format` annotations from these records. The string below a field describes it
in `openapi.json`. Each agent's package declares the record of its section, as `AgentSchema` describes. This module
represents the section as `AgentSection`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Final, Literal, Protocol, get_type_hints

import msgspec
from annotated_types import Ge, Le, Len, MaxLen

from sandbox.model.errors import RuleViolation
from sandbox.model.fixed_limits import LABELS_MAX
from sandbox.model.manifest.field_formats import (
    ALLOWED_HOST,
    ARTIFACT_PATTERN,
    BRANCH,
    BYTE_SIZE,
    COMMIT,
    DURATION,
    ENVIRONMENT_NAME,
    GIT_PATCH,
    LABEL_KEY,
    NO_CONTROL_CHARACTERS,
    REPOSITORY_URL,
    SUBPATH,
    TASK_ID,
    parse_byte_size,
    parse_duration,
)

FORBID_EXTRA = {"extra": "forbid"}
"""pydantic's settings for the records of a manifest."""

HEADLESS_DEFAULT = True
"""The value of `headless` if an agent's section has no such field."""

RENDERED_FORMATS = frozenset({"json", "text"})
"""The output formats that are rendered from the agent's last result. Any other format is the agent's own stdout."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Name, id and labels of the task."""

    __pydantic_config__ = FORBID_EXTRA
    name: Annotated[str, Len(1, 256), NO_CONTROL_CHARACTERS]
    """Name, shown in lists."""
    id: Annotated[str, TASK_ID] = ""
    """Id of the task; if empty, the server generates one. `stream` is reserved; `..` is not allowed."""
    labels: Annotated[
        dict[Annotated[str, Len(1, 256), LABEL_KEY], Annotated[str, MaxLen(1024), NO_CONTROL_CHARACTERS]],
        MaxLen(LABELS_MAX),
    ] = field(default_factory=dict)
    """Labels by which tasks can be selected."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The repository to clone into the workspace."""

    __pydantic_config__ = FORBID_EXTRA
    url: Annotated[str, REPOSITORY_URL]
    """URL of the git repository, without credentials."""
    branch: Annotated[str, BRANCH]
    """Branch to clone; a valid git branch name."""
    commit: Annotated[str, COMMIT] | None = None
    """Commit in the history of the branch; if absent, the newest commit of the branch."""
    subpath: Annotated[str, SUBPATH] | None = None
    """Directory in which the agent starts, relative to the repository, without `..`."""
    patch: Annotated[str, GIT_PATCH] | None = None
    """Base64 of a patch (`git diff --binary`) that is applied to the commit before the agent starts."""


class _CommonSettings(msgspec.Struct, frozen=True):
    """The fields of an agent section that Sandbox reads without the agent's driver, and their default values."""

    prompt: str
    model: str
    headless: bool = HEADLESS_DEFAULT
    output_format: str = ""


@dataclass(frozen=True)
class AgentSection:
    """The agent's section. Its key in the manifest is the kind of the agent, which selects the agent's driver.

    settings: the validated section with its defaults, as plain data. The properties are the fields that Sandbox itself
    reads; only the driver reads the others. The constructor raises msgspec.ValidationError if one of these fields has a
    wrong type.
    """

    kind: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        msgspec.convert(self.settings, _CommonSettings)

    @property
    def prompt(self) -> str:
        """The agent's prompt; empty in the rows of the index, which stores prompts separately."""
        return str(self.settings["prompt"])

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.settings["model"])

    @property
    def is_interactive(self) -> bool:
        """Whether the agent has a terminal that users can attach to (`headless: false`)."""
        return not self.settings.get("headless", HEADLESS_DEFAULT)

    @property
    def output_format(self) -> str:
        """The format of the task's stdout: one of RENDERED_FORMATS, or the name of the agent's own format."""
        return str(self.settings.get("output_format", ""))

    @property
    def has_rendered_stdout(self) -> bool:
        """Whether the task's stdout is rendered from the agent's last result, rather than being the agent's stdout."""
        return not self.is_interactive and self.output_format in RENDERED_FORMATS

    @property
    def recorded_stream(self) -> Literal["stdout", "transcript"]:
        """The stream under which the agent's own stdout is recorded."""
        return "transcript" if self.has_rendered_stdout else "stdout"

    def with_prompt(self, prompt: str) -> AgentSection:
        """Return a copy of the section with a different prompt."""
        return self.with_setting("prompt", prompt)

    def with_setting(self, name: str, value: object) -> AgentSection:
        """Return a copy of the section with one field changed."""
        return AgentSection(self.kind, {**self.settings, name: value})


class AgentSchema(Protocol):
    """What a manifest's section for one agent may contain."""

    @property
    def kind(self) -> str:
        """The key of the section in the manifest."""
        ...

    @property
    def section_type(self) -> Any:
        """The type of the section: a dataclass with `FORBID_EXTRA` and the fields that `AgentSection` reads.

        `prompt` is a required string. `model` is a string with a default. `headless` (default true) and `output_format`
        are optional.
        """
        ...

    def find_violations(self, section: dict[str, Any], secret_names: Collection[str]) -> Iterator[RuleViolation]:
        """Yield the violations of rules that involve several fields of the section. Paths are relative to the section.

        Values may have wrong types; the schema reports them. secret_names: the names of the task's secrets.
        """
        ...

    def is_reserved_variable(self, name: str) -> bool:
        """Return whether a secret with this name would redirect the agent or load code into it."""
        ...

    def used_models(self, section: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield each model that the agent requests: the field of the section, and the field's value or default.

        Omits values that have wrong types.
        """
        ...

    def has_price(self, model: str) -> bool:
        """Return whether the price of a model is known, as `lifecycle.budget_usd` requires."""
        ...


@dataclass(frozen=True, kw_only=True)
class Vm:
    """Profile, resources and network access of the sandbox."""

    __pydantic_config__ = FORBID_EXTRA
    profile: Annotated[str, Len(1, 64), NO_CONTROL_CHARACTERS] = "agentic-dev"
    """Profile that the server offers."""
    cpus: Annotated[int, Ge(1), Le(4096)] = 4
    """Number of CPUs."""
    memory: Annotated[str, BYTE_SIZE] = "8G"
    """Memory, such as `8G`."""
    disk: Annotated[str, BYTE_SIZE] = "40G"
    """Total disk space for workspace, home and /tmp, such as `40G`."""
    network_mode: Literal["isolated", "outbound", "full"] = "isolated"
    """`isolated`: the model only. `outbound`: also `allowed_hosts`. `full`: any public name."""
    allowed_hosts: Annotated[tuple[Annotated[str, ALLOWED_HOST], ...], MaxLen(256)] = ()
    """Host names, or `*.` and a domain, with an optional `:port`; only with `outbound`."""

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return parse_byte_size(self.memory)

    @property
    def disk_bytes(self) -> int:
        """Disk in bytes."""
        return parse_byte_size(self.disk)


@dataclass(frozen=True, kw_only=True)
class Secret:
    """An environment variable of the agent, and the source of its value."""

    __pydantic_config__ = FORBID_EXTRA
    name: Annotated[str, ENVIRONMENT_NAME]
    """Name of the environment variable."""
    source: Literal["env", "file", "vault"]
    """Where the server reads the value."""
    key: Annotated[str, Len(1, 1024), NO_CONTROL_CHARACTERS]
    """Name of the value in its source."""


@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """Timeouts, budgets, retries and artifacts."""

    __pydantic_config__ = FORBID_EXTRA
    timeout: Annotated[str, DURATION] = "24h"
    """How long the agent may run, in total across all attempts, such as `90s`, `15m` or `24h`."""
    failure_action: Literal["destroy", "preserve"] = "destroy"
    """Whether the files of a failed task's sandbox are kept."""
    artifact_patterns: Annotated[tuple[Annotated[str, ARTIFACT_PATTERN], ...], MaxLen(256)] = ()
    """Globs of files to keep, relative to the workspace."""
    stage_timeout: Annotated[str, DURATION] = "15m"
    """Time limit for cloning."""
    provision_timeout: Annotated[str, DURATION] = "10m"
    """Time limit for creating the sandbox."""
    hang_timeout: Annotated[str, DURATION] = "30m"
    """How long the agent may be silent with no model request in flight and no client on its terminal."""
    collect_timeout: Annotated[str, DURATION] = "10m"
    """Time limit for collecting artifacts."""
    budget_usd: Annotated[float, Ge(0), Le(1_000_000)] | None = None
    """Maximum total cost of all attempts, in USD; only with a model whose price is known."""
    budget_tokens: Annotated[int, Ge(1), Le(10**15)] | None = None
    """Maximum total number of tokens of all attempts."""
    retries: Annotated[int, Ge(0), Le(100)] = 0
    """Maximum number of times that a failed agent is run again from a fresh workspace."""
    resume: bool = False
    """Whether an agent that was lost with its machine continues its session."""

    @property
    def timeout_seconds(self) -> int:
        """Time limit for the agent, in seconds."""
        return parse_duration(self.timeout)

    @property
    def stage_timeout_seconds(self) -> int:
        """Time limit for cloning, in seconds."""
        return parse_duration(self.stage_timeout)

    @property
    def provision_timeout_seconds(self) -> int:
        """Time limit for creating the sandbox, in seconds."""
        return parse_duration(self.provision_timeout)

    @property
    def hang_timeout_seconds(self) -> int:
        """How long the agent may be silent with no model request in flight, in seconds."""
        return parse_duration(self.hang_timeout)

    @property
    def collect_timeout_seconds(self) -> int:
        """Time limit for collecting artifacts, in seconds."""
        return parse_duration(self.collect_timeout)


@dataclass(frozen=True, kw_only=True)
class CommonFields:
    """One task as submitted, with the defaults filled in."""

    __pydantic_config__ = FORBID_EXTRA
    version: Literal["1"]
    """Version of this schema."""
    kind: Literal["Task"]
    """Always `Task`."""
    metadata: Metadata
    """Name, id and labels."""
    repository: Repository
    """The repository to work on."""
    vm: Vm = field(default_factory=Vm)
    """Profile, resources and network access of the sandbox."""
    secrets: Annotated[tuple[Secret, ...], MaxLen(64)] = ()
    """Environment variables of the agent with secret values."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    """Timeouts, budgets, retries and artifacts."""


_AGENT_POSITION = 4
_CONSTANTS = {"version": "1", "kind": "Task"}
_SECTION_NAMES = tuple(each.name for each in fields(CommonFields) if each.name not in _CONSTANTS)
_COMMON_NAMES = frozenset({*_CONSTANTS, *_SECTION_NAMES})


class Manifest:
    """One task as submitted, with the defaults filled in.

    It is encoded as one mapping. The key of its agent section is the agent's kind. Wherever a manifest is part of the
    data, msgspec therefore needs `encode_manifest` and `decode_manifest` as hooks.
    """

    __slots__ = ("agent", *_SECTION_NAMES)

    def __init__(
        self,
        metadata: Metadata,
        repository: Repository,
        agent: AgentSection,
        vm: Vm = Vm(),
        secrets: tuple[Secret, ...] = (),
        lifecycle: Lifecycle = Lifecycle(),
    ) -> None:
        self.metadata: Final = metadata
        self.repository: Final = repository
        self.agent: Final = agent
        self.vm: Final = vm
        self.secrets: Final = secrets
        self.lifecycle: Final = lifecycle

    @classmethod
    def combine(cls, common: Any, agent: AgentSection) -> Manifest:
        """Create a manifest from an agent section and a record that has the other fields, such as `CommonFields`."""
        # Called for each row of a task list. Keyword arguments would take twice as long.
        return cls(common.metadata, common.repository, agent, common.vm, common.secrets, common.lifecycle)

    def replace(self, **changes: Any) -> Manifest:
        """Return a copy with these fields replaced."""
        return Manifest(**{name: getattr(self, name) for name in self.__slots__} | changes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((self.metadata.name, self.repository))

    def __repr__(self) -> str:
        return f"Manifest({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def declare_manifest(section_types: Mapping[str, Any]) -> type:
    """Declare the dataclass of a manifest with these required agent sections (types, keyed by section key)."""
    hints = get_type_hints(CommonFields, include_extras=True)
    common = [(each.name, hints[each.name], copy(each)) for each in fields(CommonFields)]
    return make_dataclass(
        Manifest.__name__,
        [*common[:_AGENT_POSITION], *section_types.items(), *common[_AGENT_POSITION:]],
        namespace={
            "__doc__": CommonFields.__doc__,
            "__module__": CommonFields.__module__,
            "__pydantic_config__": FORBID_EXTRA,
        },
        frozen=True,
        kw_only=True,
    )


def encode_manifest(value: Any) -> dict[str, Any]:
    """Encode a manifest as plain data: the hook for msgspec's encoders. Raises NotImplementedError for other values."""
    if not isinstance(value, Manifest):
        raise NotImplementedError(f"{type(value).__name__} cannot be encoded")
    items = [*_CONSTANTS.items(), *((name, getattr(value, name)) for name in _SECTION_NAMES)]
    items.insert(_AGENT_POSITION, (value.agent.kind, value.agent.settings))
    return dict(items)


def decode_manifest(kind: type, data: Any) -> Manifest:
    """Decode plain data: the hook for msgspec's decoders.

    Raises ValueError for invalid data, and NotImplementedError for other types.

    The agent section is the only mapping with a prompt. Other unknown fields are ignored, as everywhere in records.
    """
    if kind is not Manifest:
        raise NotImplementedError(f"{kind.__name__} cannot be decoded")
    common = msgspec.convert(data, CommonFields)
    other = data.keys() - _COMMON_NAMES
    sections = [(name, data[name]) for name in other if isinstance(data[name], dict) and "prompt" in data[name]]
    if len(sections) != 1:
        raise ValueError("the manifest has no agent section, or several")
    return Manifest.combine(common, AgentSection(*sections[0]))
