"""Runs workers as Jobs of Kubernetes, one Pod for each."""
