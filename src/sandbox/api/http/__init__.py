"""HTTP server: sockets, request framing and connection limits."""
