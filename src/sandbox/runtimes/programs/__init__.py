"""Programs that run before and next to a sandbox, without importing the package."""
