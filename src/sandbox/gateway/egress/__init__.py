"""Connections to hosts other than the model API."""
