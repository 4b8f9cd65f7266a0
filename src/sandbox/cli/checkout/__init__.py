"""The user's own git checkout."""
