"""Live streams: responses, server-sent events, and the events that streams share."""
