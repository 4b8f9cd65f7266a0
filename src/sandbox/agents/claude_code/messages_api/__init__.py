"""The API of Claude Code's model: Anthropic's Messages API."""
