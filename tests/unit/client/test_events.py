"""The client returns the events that the server declares, under its own names."""

from typing import is_typeddict

import pytest

import sandbox.client
from sandbox.client import events
from sandbox.model.wire import event_bodies

NAMES = {
    "AgentMessage": "AgentMessageEvent",
    "AgentResult": "AgentResultEvent",
    "AttemptBegun": "AttemptEvent",
    "BaseEvent": "BaseEvent",
    "Conversation": "ConversationEvent",
    "EgressDenied": "EgressDeniedEvent",
    "End": "EndEvent",
    "FileEdit": "FileEditBody",
    "Gap": "GapEvent",
    "Measured": "MetricsEvent",
    "Metrics": "MetricsBody",
    "Output": "OutputEvent",
    "ProgressMade": "ProgressEvent",
    "StateChange": "StateChangeEvent",
    "ToolCall": "ToolCallEvent",
    "ToolCallStarted": "ToolCallStartedEvent",
    "ToolResult": "ToolResultEvent",
    "Trouble": "ErrorEvent",
    "Usage": "UsageEvent",
}


@pytest.mark.parametrize(("name", "declared"), NAMES.items())
def test_names_of_the_client_stay(name, declared):
    assert getattr(events, name) is getattr(event_bodies, declared)
    assert getattr(sandbox.client, name, getattr(events, name)) is getattr(events, name)


def test_all_types_are_listed_here():
    assert {name for name, kind in vars(events).items() if is_typeddict(kind)} == set(NAMES)
    assert sandbox.client.Event is events.Event is event_bodies.Event
