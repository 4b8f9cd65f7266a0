"""Clones a repository into a workspace."""
