"""Bodies of requests and responses, and events, as clients send and receive them."""
