"""Clones repositories into workspaces and collects patches and artifacts from them."""
