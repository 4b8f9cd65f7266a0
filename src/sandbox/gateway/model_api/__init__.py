"""Connections to the model API."""
