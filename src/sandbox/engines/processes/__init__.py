"""Runs workers as processes of this machine, without an engine."""
