"""Where a server is when nobody says otherwise."""

DEFAULT_SERVER = "http://localhost:8122"
