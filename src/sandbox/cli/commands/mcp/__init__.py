"""`sandbox mcp`: a Model Context Protocol server, with which agents submit tasks to Sandbox."""
