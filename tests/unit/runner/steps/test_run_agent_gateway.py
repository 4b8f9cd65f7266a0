"""A gateway's reports are recorded. If an event cannot be recorded, one of the runner's loops raises the error."""

import asyncio
from datetime import UTC, datetime

import pytest

from sandbox.interfaces.gateway import BudgetExhausted, KeyRejected
from sandbox.model.events import AttemptFailed, EgressDenied, Progress, Usage
from sandbox.model.failure import FailureCode, FailureReason
from sandbox.runner.progress_and_conversation_recorder import ProgressAndConversationRecorder
from sandbox.runner.steps.run import GatewayEventRecorder, serve_gateway

USAGE = Usage("m", 100, 10)
TIMESTAMP = datetime(2026, 1, 29, tzinfo=UTC)


class FakeRecorder:
    """Records events until `error` is set."""

    def __init__(self):
        self.events, self.snapshots, self.error = [], [], None
        self.progress = ProgressAndConversationRecorder(self.snapshots.append, lambda: TIMESTAMP, Progress())
        self.gateway_events = GatewayEventRecorder(self.record, self.progress)

    def record(self, event):
        if self.error is not None:
            raise self.error
        self.events.append(event)


class FakeGateway:
    def __init__(self, error):
        self._error = error

    async def serve(self, _):
        raise self._error


async def test_reports_are_recorded_immediately_and_usage_is_counted():
    recorder = FakeRecorder()
    denied = EgressDenied("example.org", 443, "not allowed")
    recorder.gateway_events.report(USAGE)
    recorder.gateway_events.report(denied)
    assert recorder.events == [USAGE, denied]
    recorder.progress.close()
    assert [(one.input_tokens, one.output_tokens) for one in recorder.snapshots] == [(100, 10)]


@pytest.mark.parametrize(
    ("event", "code", "reason"),
    [
        (BudgetExhausted("It is spent."), FailureCode.BUDGET_EXCEEDED, ""),
        (KeyRejected("It is wrong."), FailureCode.AGENT_FAILED, FailureReason.MODEL_REJECTED),
    ],
)
async def test_lost_model_access_fails_the_attempt(event, code, reason):
    recorder = FakeRecorder()
    recorder.gateway_events.report(event)
    (failed,) = recorder.events
    assert isinstance(failed, AttemptFailed)
    assert (failed.failure.code, failed.failure.reason, failed.failure.message) == (code, reason, event.message)


async def test_error_while_recording_an_event_is_raised_in_a_background_loop():
    recorder = FakeRecorder()
    background_loop = asyncio.create_task(recorder.gateway_events.raise_error())
    recorder.gateway_events.report(USAGE)
    await asyncio.sleep(0)
    assert not background_loop.done()
    recorder.error = OSError(28, "No space left on device")
    recorder.gateway_events.report(USAGE)
    with pytest.raises(OSError, match="No space"):
        await asyncio.wait_for(background_loop, 10)


async def test_failed_gateway_is_reported_as_a_lost_sandbox():
    recorder = FakeRecorder()
    await serve_gateway(FakeGateway(ValueError("secret")), None, recorder.record)
    (failed,) = recorder.events
    assert failed.failure.code is FailureCode.SANDBOX_LOST
    assert "ValueError" in failed.failure.message
    assert "secret" not in failed.failure.message
