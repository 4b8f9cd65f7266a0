"""Agents that Sandbox can run: one package per agent, and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.interfaces.agent import Agent


def registered_agents() -> Mapping[str, Agent]:
    """Return Sandbox's agents, keyed by the name of their manifest section. The first agent is the CLI's default."""
    from sandbox.agents.claude_code.agent import ClaudeCode

    return {agent.kind: agent for agent in (ClaudeCode(),)}
