"""Runs git on the host."""
