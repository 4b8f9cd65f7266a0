"""`sandbox mcp`: the server of the Model Context Protocol, so that agents can hand work to Sandbox."""
