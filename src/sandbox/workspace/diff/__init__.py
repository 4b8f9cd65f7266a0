"""The patch: what the agent changed."""
