"""The index of tasks. It can be rebuilt from the journals."""
