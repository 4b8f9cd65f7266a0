"""Redacts the values of secrets in every common encoding."""
