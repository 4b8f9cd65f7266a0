"""Claude Code as one of Sandbox's agents. A module that only one method needs is imported in that method."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.agents.claude_code import manifest_section as rules
from sandbox.agents.claude_code.manifest_section import DISPLAY_NAME, KIND, Claude
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.model.input_errors import RuleViolation

if TYPE_CHECKING:
    from sandbox.interfaces.agent import AgentDriver, ManifestTemplate
    from sandbox.interfaces.model_dialect import ModelDialect
    from sandbox.model.events import ConversationEvent
    from sandbox.model.manifest.schema import Manifest

DEFAULT_BASE_URL = "https://api.anthropic.com"


class ClaudeCode:
    """Implements `Agent`."""

    kind = KIND
    display_name = DISPLAY_NAME
    section_type = Claude
    field_summary = "claude.model, claude.allowed_tools, claude.max_turns"
    api_key_variable = "ANTHROPIC_API_KEY"
    server_variable_prefix = "ANTHROPIC_"

    @property
    def manifest_templates(self) -> Sequence[ManifestTemplate]:
        """The manifest templates. The first template has only the required fields."""
        from sandbox.agents.claude_code.manifest_templates import MANIFEST_TEMPLATES

        return MANIFEST_TEMPLATES

    @property
    def priced_models(self) -> Sequence[str]:
        """The models that have a price, named without their dates."""
        from sandbox.agents.claude_code.messages_api.pricing import PRICED_MODELS

        return PRICED_MODELS

    def find_violations(self, section: dict[str, Any], secret_names: Collection[str]) -> Iterator[RuleViolation]:
        """Yield the violations of rules that span several fields of the section."""
        return rules.find_violations(section, secret_names)

    def is_reserved_variable(self, name: str) -> bool:
        """Return whether a secret with this name would redirect the agent or load code into it."""
        return rules.is_reserved_variable(name)

    def used_models(self, section: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (field, model) for each model that the agent requests."""
        model = section.get("model", Claude.model)
        if isinstance(model, str):
            yield "model", model

    def has_price(self, model: str) -> bool:
        """Return whether the price of a model is known."""
        from sandbox.agents.claude_code.messages_api.pricing import has_price

        return has_price(model)

    def find_version(self) -> str:
        """Return the version of the installed binary. Raises BinaryMissingError."""
        from sandbox.agents.claude_code.binary_install import binary_version, find_binary

        return binary_version(find_binary())

    def install(self, data_dir: Path) -> Path:
        """Return the path of the copied binary that sandboxes run; create the copy if it does not exist."""
        from sandbox.agents.claude_code.binary_install import install_binary

        return install_binary(data_dir)

    def upstream_from_environment(self, environment: Mapping[str, str]) -> ModelUpstream | None:
        """Return the base URL and the key for the Messages API, or None if there is no key.

        An API key takes precedence over a token.
        """
        base_url = environment.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL
        api_key, auth_token = (environment.get(f"ANTHROPIC_{name}", "") for name in ("API_KEY", "AUTH_TOKEN"))
        if not api_key and not auth_token:
            return None
        return ModelUpstream(base_url, api_key=api_key, auth_token="" if api_key else auth_token)

    def convert_recorded_line(self, manifest: Manifest, line: bytes) -> Sequence[ConversationEvent] | None:
        """Convert an output line that an earlier version of Sandbox recorded."""
        from sandbox.agents.claude_code.output_parser import convert_recorded_line

        return convert_recorded_line(manifest, line)

    def create_dialect(self) -> ModelDialect:
        """Create the Messages API dialect."""
        from sandbox.agents.claude_code.messages_api.dialect import MessagesApi

        return MessagesApi()

    def create_driver(self, program: Path) -> AgentDriver:
        """Create the driver. program: the path that `install` returned."""
        from sandbox.agents.claude_code.driver import ClaudeCodeDriver

        return ClaudeCodeDriver(program)
