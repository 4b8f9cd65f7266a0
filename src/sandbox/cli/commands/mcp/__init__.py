"""`sandbox mcp`: a Model Context Protocol server that lets agents submit tasks to Sandbox."""
