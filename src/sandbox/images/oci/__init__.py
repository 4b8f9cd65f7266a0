"""Reads OCI images."""
