"""The commands `sandbox admin …`: for whoever looks after a server."""
