"""Floor 3: the index of tasks. It can be rebuilt from the journals."""
