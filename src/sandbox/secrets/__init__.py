"""Resolves secrets, and redacts their values from everything that leaves a runner."""
