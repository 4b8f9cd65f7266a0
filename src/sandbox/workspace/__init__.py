"""Floor 3: the workspace, cloned by the host, worked on by the agent, read back by the host."""
