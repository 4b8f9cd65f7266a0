"""HTTP API: REST, event streams and WebSockets on top of the `Tasks` interface."""
