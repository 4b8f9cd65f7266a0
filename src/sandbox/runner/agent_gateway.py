"""Creates and serves the gateway of one agent, and records the gateway's events."""

import asyncio
from collections.abc import Callable
from typing import Never

from sandbox.interfaces.gateway import BudgetExhausted, Gateway, GatewayFactory, GatewayRules, KeyRejected, ReportEvent
from sandbox.interfaces.runtime import Listeners
from sandbox.model.egress import egress_rules
from sandbox.model.events import AttemptFailed, EgressDenied, ErrorReported, Event, Usage
from sandbox.model.failure import AttemptError, Failure, FailureCode, FailureReason
from sandbox.model.task import Task
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.progress_and_conversation_recorder import ProgressAndConversationRecorder
from sandbox.runner.remaining_limits import budget_with_earlier_usage
from sandbox.runner.steps.provision import ProvisionedSandbox


class GatewayEventRecorder:
    """Records the events that a gateway reports.

    The gateway cannot handle a recording error, so `raise_error` raises it in one of the runner's background loops.
    """

    def __init__(self, record: Callable[[Event], object], progress: ProgressAndConversationRecorder) -> None:
        self._record = record
        self._progress = progress
        self._errors: asyncio.Queue[Exception] = asyncio.Queue()

    def report(self, event: Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected) -> None:
        """Record an event. Implements `ReportEvent`."""
        try:
            self._record(_to_event(event))
        except Exception as error:
            self._errors.put_nowait(error)
        if isinstance(event, Usage):
            self._progress.add_usage(event)

    async def raise_error(self) -> Never:
        """Wait until an event cannot be recorded, and raise the error."""
        raise await self._errors.get()


def _to_event(event: Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected) -> Event:
    match event:
        case BudgetExhausted():
            return AttemptFailed(Failure(FailureCode.BUDGET_EXCEEDED, event.message))
        case KeyRejected():
            return AttemptFailed(Failure(FailureCode.AGENT_FAILED, event.message, reason=FailureReason.MODEL_REJECTED))
        case _:
            return event


def create_gateway(
    attempt: AttemptContext,
    provisioned: ProvisionedSandbox,
    gateways: GatewayFactory,
    api_key_variable: str,
    report: ReportEvent,
) -> Gateway:
    """Create the gateway, which listens once `serve_gateway` runs. Raises AttemptError (provision_failed).

    api_key_variable: the name of the server's environment variable that contains the model API key.
    """
    if attempt.upstream is None:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"The server has no model key; set {api_key_variable} and restart the server.",
        )
    rules = _gateway_rules(attempt.task, hold_model_requests=provisioned.launch_spec.hold_model_requests)
    redact = attempt.redactor.redact_text if attempt.redactor is not None else str
    try:
        return gateways.create(attempt.upstream, provisioned.gateway_key, report, rules, redact=redact)
    except ValueError as error:
        raise AttemptError(FailureCode.PROVISION_FAILED, str(error)) from None


def _gateway_rules(task: Task, *, hold_model_requests: bool) -> GatewayRules:
    """Return the rules for the gateway of a task's agent.

    Model requests are held only if the agent must be checked before its first request.
    """
    return GatewayRules(
        egress=egress_rules(task.manifest.vm),
        budget=budget_with_earlier_usage(task),
        hold_model_requests=hold_model_requests,
    )


async def serve_gateway(gateway: Gateway, listeners: Listeners, record: Callable[[Event], object]) -> None:
    """Serve the gateway until cancelled. If the gateway fails, record the failure."""
    try:
        await gateway.serve(listeners)
    except Exception as error:
        message = f"The sandbox's gateway failed ({type(error).__name__}); submit the task again."
        record(AttemptFailed(Failure(FailureCode.SANDBOX_LOST, message)))
