"""Rendering for terminals."""
