"""The one door of a sandbox, kept by its runner."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from sandbox.interfaces.runtime import Listeners
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage


class ModelUpstream(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where model requests go and the server's own key for it. Exactly one of the two credentials is set."""

    base_url: str
    api_key: str = ""
    auth_token: str = ""

    def __repr__(self) -> str:
        """Without the credentials, so that no log or traceback has them."""
        return f"ModelUpstream({self.base_url!r})"


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the model may cost; None is no bound. tokens: input, cached ones included, and output together.

    spent_usd, spent_tokens: of it, by earlier gateways of the same task.
    """

    usd: float | None = None
    tokens: int | None = None
    spent_usd: float = 0.0
    spent_tokens: int = 0


class GatewayRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one task's gateway lets through.

    holds_model: model requests wait, unanswered, until `release_model`.
    """

    egress: EgressRules = EgressRules()
    budget: Budget = Budget()
    hold_model_requests: bool = False


class BudgetExhausted(msgspec.Struct, frozen=True):
    """The budget is spent: no further model request is forwarded. `message` says which one and how much, for people."""

    message: str


class KeyRejected(msgspec.Struct, frozen=True):
    """The model does not take the server's key: no further model request is forwarded. `message` is for people."""

    message: str


ReportEvent = Callable[[Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected], None]
"""Told of what passes and what is refused; called on the event loop's thread, must not block."""


class Gateway(Protocol):
    """Serves one sandbox."""

    @property
    def requests_in_flight(self) -> int:
        """Model requests that were forwarded and are not answered to their end."""
        ...

    @property
    def denied_count(self) -> int:
        """Connections, requests and names that were refused so far, reported or not."""
        ...

    def release_model_requests(self) -> None:
        """Let model requests pass that `holds_model` held back."""
        ...

    async def serve(self, listeners: Listeners) -> None:
        """Answer until cancelled; then every connection is closed. Raises ExceptionGroup when a listener is lost."""
        ...


class GatewayFactory(Protocol):
    """Makes gateways."""

    def create(
        self,
        upstream: ModelUpstream,
        task_key: str,
        report: ReportEvent,
        rules: GatewayRules = GatewayRules(),
        redact: Callable[[str], str] = str,
    ) -> Gateway:
        """A gateway that knows the agent by `task_key` and the model by `upstream`.

        redact: takes the values of secrets out of names from inside, before they are cut to be reported.
        """
        ...
