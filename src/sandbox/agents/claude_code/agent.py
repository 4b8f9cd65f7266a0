"""Claude Code as one of Sandbox's agents, and the copy of its binary that sandboxes run.

A module that only one method needs is imported in that method.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import copyfileobj
from typing import TYPE_CHECKING, Any

from sandbox.agents.claude_code import manifest_section as rules
from sandbox.agents.claude_code.manifest_section import DISPLAY_NAME, KIND, Claude
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.model.errors import RuleViolation, SandboxError

if TYPE_CHECKING:
    from sandbox.interfaces.agent import AgentDriver, ManifestTemplate
    from sandbox.interfaces.gateway import ModelDialect
    from sandbox.model.events import ConversationEvent
    from sandbox.model.manifest.schema import Manifest


_PACKAGE = "claude_agent_sdk"
_EXECUTE_ONLY = 0o111


class BinaryMissingError(SandboxError):
    """The claude binary was not found on this machine."""

    code = "agent_missing"


def find_binary() -> Path:
    """Return the claude binary in the installed claude-agent-sdk wheel. Raises BinaryMissingError."""
    spec = importlib.util.find_spec(_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(directory) / "_bundled" / "claude"
        if binary.is_file():
            return binary
    raise BinaryMissingError(
        "There is no claude binary; install the claude-agent-sdk wheel for this platform (its sdist contains none)."
    )


def binary_version(binary: Path) -> str:
    """Return the version, such as `2.1.332`, from a file next to the binary; `unknown` if the file cannot be read."""
    try:
        words = binary.with_name("claude.version").read_text().split()
    except OSError:
        return "unknown"
    return words[0].replace("/", "_") if words else "unknown"


def install_binary(data_dir: Path, source: Path | None = None) -> Path:
    """Return the path of the execute-only copy under `data_dir`; create the copy if it does not exist.

    The kernel makes a process non-dumpable if its user cannot read its program. Therefore, processes that the agent
    starts cannot trace the agent, read its environment, or open its stdout to forge a result, although they run with
    the same uid. For this to work, the launcher must have dropped CAP_DAC_OVERRIDE before it executes the copy.

    Raises BinaryMissingError, or OSError if the copy cannot be written.
    """
    source = source or find_binary()
    directory = data_dir / "agent"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = directory / f"claude-{binary_version(source)}-{source.stat().st_size}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_installed(target):
            _copy(source, target)
    return target


def _is_installed(target: Path) -> bool:
    """Return whether the complete copy exists. A copy gets its final name only when it is complete."""
    return target.is_file() and stat.S_IMODE(target.stat().st_mode) == _EXECUTE_ONLY


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name("partial")
    partial.unlink(missing_ok=True)
    with source.open("rb") as reader, partial.open("xb") as writer:
        copyfileobj(reader, writer, 16 * 1024 * 1024)
        writer.flush()
        os.fchmod(writer.fileno(), _EXECUTE_ONLY)
        os.fsync(writer.fileno())
    partial.replace(target)


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
        from sandbox.agents.claude_code.manifest_section import MANIFEST_TEMPLATES

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
        return binary_version(find_binary())

    def install(self, data_dir: Path) -> Path:
        """Return the path of the copied binary that sandboxes run; create the copy if it does not exist."""
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
