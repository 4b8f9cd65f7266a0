"""Output for terminals and pipes: text, tables, messages and events."""
