"""Compares the workspace with the base commit and writes the patch."""
