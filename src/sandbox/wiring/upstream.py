"""Where the model is, by the server's own environment."""

from collections.abc import Mapping

from sandbox.contracts.gateway import ModelUpstream

DEFAULT_BASE_URL = "https://api.anthropic.com"


def read_upstream(environment: Mapping[str, str]) -> ModelUpstream | None:
    """ANTHROPIC_BASE_URL and the key for it; None without a key. The API key goes before the token."""
    base_url = environment.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL
    if api_key := environment.get("ANTHROPIC_API_KEY"):
        return ModelUpstream(base_url, api_key=api_key)
    if auth_token := environment.get("ANTHROPIC_AUTH_TOKEN"):
        return ModelUpstream(base_url, auth_token=auth_token)
    return None
