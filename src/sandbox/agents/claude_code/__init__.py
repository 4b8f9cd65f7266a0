"""Floor 3: Claude Code, as it is started, read and judged."""
