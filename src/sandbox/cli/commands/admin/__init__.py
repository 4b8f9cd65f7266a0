"""The commands `sandbox admin …`, for operators of a server."""
