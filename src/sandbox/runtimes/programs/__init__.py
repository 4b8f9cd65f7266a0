"""Programs that run before and next to a sandbox, without the package."""
