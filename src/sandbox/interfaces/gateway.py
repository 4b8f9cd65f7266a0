"""The gateway, a sandbox's only network access, and its ports."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from sandbox.interfaces.runtime import Listeners
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

MODEL_PORT = 8123
"""Port of the gateway's model API on 127.0.0.1."""

PROXY_PORT = 3128
"""Port of the gateway's HTTP proxy on 127.0.0.1."""


class ModelUpstream(msgspec.Struct, frozen=True, omit_defaults=True):
    """The address of the model API, and the server's own key for it.

    Exactly one of `api_key` and `auth_token` is set.
    """

    base_url: str
    api_key: str = ""
    auth_token: str = ""

    def __repr__(self) -> str:
        """Omit the credentials, which must not reach logs or tracebacks."""
        return f"ModelUpstream({self.base_url!r})"


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits on the model's cost; None means no limit. tokens: input (including cached) plus output.

    spent_usd, spent_tokens: already spent by earlier gateways of the same task.
    """

    usd: float | None = None
    tokens: int | None = None
    spent_usd: float = 0.0
    spent_tokens: int = 0


class GatewayRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """The egress rules and the budget that the gateway of one task enforces.

    hold_model_requests: model requests wait without a response until `release_model_requests` is called.
    """

    egress: EgressRules = EgressRules()
    budget: Budget = Budget()
    hold_model_requests: bool = False


class BudgetExhausted(msgspec.Struct, frozen=True):
    """The budget is spent; no more model requests are forwarded.

    `message`: the limit that was reached, human-readable.
    """

    message: str


class KeyRejected(msgspec.Struct, frozen=True):
    """The model API rejects the server's key; no more model requests are forwarded. `message`: human-readable."""

    message: str


ReportEvent = Callable[[Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected], None]
"""Receives usage, denials and errors. Called on the event loop's thread; must not block."""


class Gateway(Protocol):
    """Serves the connections of one sandbox."""

    @property
    def requests_in_flight(self) -> int:
        """The number of forwarded model requests whose responses are not complete."""
        ...

    @property
    def denied_count(self) -> int:
        """The number of connections, requests and names denied so far, including those that were not reported."""
        ...

    def release_model_requests(self) -> None:
        """Forward the model requests that `hold_model_requests` holds back."""
        ...

    async def serve(self, listeners: Listeners) -> None:
        """Serve until cancelled, then close every connection. Raises ExceptionGroup if a listener is lost."""
        ...


class GatewayFactory(Protocol):
    """Creates gateways."""

    def create(
        self,
        upstream: ModelUpstream,
        gateway_key: str,
        report: ReportEvent,
        rules: GatewayRules = GatewayRules(),
        redact: Callable[[str], str] = str,
    ) -> Gateway:
        """Create a gateway. `gateway_key` authenticates the agent; `upstream` is the model API.

        redact: removes secret values from names that come from the sandbox, before they are truncated for a report.
        """
        ...
