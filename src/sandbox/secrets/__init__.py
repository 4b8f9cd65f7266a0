"""Secrets: resolves their values and redacts them from everything that leaves a runner."""
