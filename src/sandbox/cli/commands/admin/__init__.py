"""The `sandbox admin …` commands, for operators of a server."""
