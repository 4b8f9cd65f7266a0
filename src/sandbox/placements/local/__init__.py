"""Runs attempts on the server's machine."""
