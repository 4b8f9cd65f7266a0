"""Claude Code: starts it, parses its output and determines its outcome."""
