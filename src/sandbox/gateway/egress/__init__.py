"""Connections from the sandbox to hosts other than the model API."""
