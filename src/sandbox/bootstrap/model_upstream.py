"""The address of the model API and the server's key for it, from the environment."""

from collections.abc import Mapping

from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.gateway import ModelUpstream


def upstream_from_environment(agent: Agent, environment: Mapping[str, str]) -> ModelUpstream | None:
    """Return the base URL and the key of the agent's model API; None if there is no key.

    Raises ConfigurationError if the gateway cannot use them.
    """
    upstream = agent.upstream_from_environment(environment)
    if upstream is None:
        return None
    try:
        parse_upstream(upstream, agent.create_dialect())
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return upstream
