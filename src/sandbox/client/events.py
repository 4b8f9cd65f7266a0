"""Events of a task, as the dictionaries that the server sends; `type` distinguishes them.

`sandbox.model.wire.event_bodies` declares them and describes each key; these are the client's names. A newer server may
send additional types: ignore them.
"""

from sandbox.model.wire import event_bodies

BaseEvent = event_bodies.BaseEvent
Event = event_bodies.Event

StateChange = event_bodies.StateChangeEvent
AttemptBegun = event_bodies.AttemptEvent
Output = event_bodies.OutputEvent
AgentMessage = event_bodies.AgentMessageEvent
FileEdit = event_bodies.FileEditBody
ToolCallStarted = event_bodies.ToolCallStartedEvent
ToolResult = event_bodies.ToolResultEvent
AgentResult = event_bodies.AgentResultEvent
Conversation = event_bodies.ConversationEvent
ProgressMade = event_bodies.ProgressEvent
Metrics = event_bodies.MetricsBody
Measured = event_bodies.MetricsEvent
ToolCall = event_bodies.ToolCallEvent
Usage = event_bodies.UsageEvent
EgressDenied = event_bodies.EgressDeniedEvent
Trouble = event_bodies.ErrorEvent
Gap = event_bodies.GapEvent
End = event_bodies.EndEvent
