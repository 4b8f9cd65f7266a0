"""Cloning a repository into a workspace."""
