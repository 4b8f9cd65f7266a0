"""Output for terminals and pipes: text, tables, patches, messages and prompts."""
