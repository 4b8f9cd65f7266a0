"""Floor 5: the REST and WebSocket doors. They turn HTTP into calls of `Tasks` and its answers back into HTTP."""
