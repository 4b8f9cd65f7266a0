"""Live streams: server-sent events, NDJSON, WebSockets."""
