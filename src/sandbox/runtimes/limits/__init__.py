"""Limits that the host enforces on a sandbox."""
