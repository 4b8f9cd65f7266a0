"""Starts Claude Code, parses its output and determines its outcome."""
