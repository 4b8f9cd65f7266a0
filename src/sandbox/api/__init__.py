"""HTTP API: REST, event streams and WebSockets on top of the Protocols of `interfaces.server_services`."""
