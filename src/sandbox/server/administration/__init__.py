"""What the server offers to its operator: health, load, hosts, draining, pruning, and the integrity check."""
