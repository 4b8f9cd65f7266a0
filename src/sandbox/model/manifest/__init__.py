"""The task manifest: schema, parsing and validation."""
