"""Routes of the REST API, and the WebSocket endpoints."""
