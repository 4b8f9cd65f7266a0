"""Floor 3: the journal of a task, a file that only grows."""
