"""Floor 3: where the values of secrets come from, and how they are kept out of everything that leaves a runner."""
