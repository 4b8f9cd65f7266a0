"""Programs that become a sandbox or run alongside one, and their shared limits. They do not import the package."""
