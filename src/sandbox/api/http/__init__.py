"""HTTP server: sockets, framing, connections."""
