"""Ends tasks whose last attempt was lost or could not be started, without a runner."""

from sandbox.interfaces.journal import Recorder
from sandbox.interfaces.placement import Loss
from sandbox.model.events import AttemptTornDown, FollowUp, FollowUpSkipped, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.state_machine import failure_event, next_follow_up
from sandbox.model.task_state import TaskState


def end_without_follow_up(recorder: Recorder, failure: Failure) -> None:
    """End the task without another attempt, because parts of the last one may still be running.

    If the outcome is complete and its files are collected, the outcome is kept. Otherwise, the task fails, or is
    cancelled if a cancel request was recorded.
    """
    if not recorder.task.needs_only_teardown:
        _record_failure(recorder, failure)
    recorder.record(TaskFinished())


def end_lost_attempt(recorder: Recorder, loss: Loss) -> None:
    """End an attempt whose host was abandoned; if no other attempt follows, end the task.

    The disk is gone, so no attempt can take it over, and nothing can be collected.
    """
    task, failure = recorder.task, Failure(loss.code, _lost_message(loss))
    if task.attempt_state is TaskState.RUNNING or not (task.needs_only_teardown or task.failure is not None):
        recorder.record(failure_event(task, failure))
    while (follow_up := next_follow_up(recorder.task)) is not None:
        if follow_up is not FollowUp.RESUME:
            recorder.record(AttemptTornDown())
            return
        recorder.record(FollowUpSkipped(follow_up, "The disk of the attempt was lost."))
    end_without_follow_up(recorder, failure)


def _lost_message(loss: Loss) -> str:
    """Return the engine's reason, such as `OOMKilled`, and what to do. The reason replaces the general cause."""
    cause = loss.reason.rstrip(".") or _LOSS_CAUSES[loss.code]
    return f"{cause}. The work of the task is lost. Submit the task again."


_LOSS_CAUSES = {
    FailureCode.RUNNER_LOST: "The worker of the task was ended",
    FailureCode.HOST_LOST: "The task's host is no longer responding",
}


def _record_failure(recorder: Recorder, failure: Failure) -> None:
    recorder.record(failure_event(recorder.task, failure))
    while (follow_up := next_follow_up(recorder.task)) is not None:
        recorder.record(FollowUpSkipped(follow_up, failure.message))
