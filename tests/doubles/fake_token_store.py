"""Access tokens in memory; each token is the id of its principal."""

from sandbox.interfaces.auth import Principal, Role


class FakeTokenStore:
    """Implements `TokenStore`. roles: each principal's role, keyed by id; empty if no tokens exist."""

    def __init__(self, **roles: str) -> None:
        self.roles = roles
        self.has_tokens = bool(roles)

    def authenticate(self, token: str | None) -> Principal | None:
        return self.find_principal(token) if token is not None else None

    def find_principal(self, principal_id: str) -> Principal | None:
        role = self.roles.get(principal_id)
        return Principal(principal_id, principal_id, Role(role)) if role is not None else None
