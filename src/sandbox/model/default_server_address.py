"""The default address of a server."""

DEFAULT_API_PORT = 8122
DEFAULT_WEBSOCKET_PORT = 8121

DEFAULT_SERVER = f"http://localhost:{DEFAULT_API_PORT}"
"""The base URL for clients on the same machine."""
