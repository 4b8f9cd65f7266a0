"""A second agent, structured like a package of `sandbox/agents/`. It is a small program that uses another model API.

`server.py` and `runner.py` compose Sandbox with it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len

from sandbox.agents import registered_agents
from sandbox.interfaces.agent import Agent, AgentDriver, ManifestTemplate
from sandbox.interfaces.gateway import ModelDialect, ModelUpstream
from sandbox.model.errors import RuleViolation
from sandbox.model.events import ConversationEvent
from sandbox.model.manifest.field_formats import NO_CONTROL_CHARACTERS, PROMPT
from sandbox.model.manifest.parsed_document import as_text
from sandbox.model.manifest.schema import FORBID_EXTRA, Manifest

TEMPLATE = """\
version: "1"
kind: Task
metadata:
  name: "My task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
scripted:
  prompt: "Describe the work for the scripted agent here"
"""


@dataclass(frozen=True, kw_only=True)
class SecondAgentSection:
    """Prompt and settings of the scripted agent."""

    __pydantic_config__ = FORBID_EXTRA
    prompt: Annotated[str, PROMPT]
    model: Annotated[str, Len(1, 256), NO_CONTROL_CHARACTERS] = "scripted-1"
    effort: Literal["low", "high"] = "low"


class SecondAgent:
    """Implements `Agent`."""

    kind = "scripted"
    display_name = "Scripted Agent"
    section_type = SecondAgentSection
    field_summary = "scripted.model, scripted.effort"
    priced_models = ()
    manifest_templates: Sequence[ManifestTemplate] = (ManifestTemplate("Scripted", "A second agent.", TEMPLATE),)
    api_key_variable = "RESPONSES_API_KEY"
    server_variable_prefix = "RESPONSES_"

    def find_violations(self, section: dict[str, Any], secret_names: Collection[str]) -> Iterator[RuleViolation]:
        if section.get("effort") == "high" and as_text(section.get("model")) == "scripted-small":
            yield RuleViolation(("effort",), "format", "must be low for this model")

    def is_reserved_variable(self, name: str) -> bool:
        return name.startswith(self.server_variable_prefix)

    def used_models(self, section: dict[str, Any]) -> Iterator[tuple[str, str]]:
        yield "model", as_text(section.get("model", SecondAgentSection.model))

    def has_price(self, model: str) -> bool:
        from doubles.responses_api import USD_PER_TOKEN

        return model in USD_PER_TOKEN

    def find_version(self) -> str:
        return "1"

    def install(self, data_dir: Path) -> Path:
        target = data_dir / "agent" / "scripted"
        target.parent.mkdir(mode=0o755, exist_ok=True)
        partial = target.with_name("scripted.partial")
        partial.write_bytes((Path(__file__).parent / "program.py").read_bytes())
        partial.chmod(0o555)
        partial.replace(target)
        return target

    def upstream_from_environment(self, environment: Mapping[str, str]) -> ModelUpstream | None:
        key = environment.get("RESPONSES_API_KEY")
        return ModelUpstream(environment["RESPONSES_BASE_URL"], api_key=key) if key else None

    def convert_recorded_line(self, manifest: Manifest, line: bytes) -> Sequence[ConversationEvent] | None:
        return None

    def create_dialect(self) -> ModelDialect:
        from doubles.responses_api import ResponsesApi

        return ResponsesApi()

    def create_driver(self, program: Path) -> AgentDriver:
        from doubles.second_agent.driver import SecondAgentDriver

        return SecondAgentDriver(program)


def all_agents() -> Mapping[str, Agent]:
    """Return Sandbox's own agents and the scripted agent, as if the registry had an entry for it."""
    second = SecondAgent()
    return {**registered_agents(), second.kind: second}
