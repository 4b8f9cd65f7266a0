"""Programs that become a sandbox or run alongside one. They do not import the package."""
