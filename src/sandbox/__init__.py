"""Sandbox runs coding agents as tasks that people can trust."""

__version__ = "0.1.0"
