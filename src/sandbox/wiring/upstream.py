"""Where the model is, by the server's own environment."""

from collections.abc import Mapping

from sandbox.contracts.gateway import ModelUpstream
from sandbox.gateway.upstream import parse_upstream
from sandbox.wiring.configuration import ConfigurationError

DEFAULT_BASE_URL = "https://api.anthropic.com"


def read_upstream(environment: Mapping[str, str]) -> ModelUpstream | None:
    """ANTHROPIC_BASE_URL and the key for it; None without a key. The API key goes before the token.

    Raises ConfigurationError where no gateway could use them.
    """
    base_url = environment.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL
    api_key, auth_token = (environment.get(f"ANTHROPIC_{name}", "") for name in ("API_KEY", "AUTH_TOKEN"))
    if not api_key and not auth_token:
        return None
    upstream = ModelUpstream(base_url, api_key=api_key, auth_token="" if api_key else auth_token)
    try:
        parse_upstream(upstream)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return upstream
