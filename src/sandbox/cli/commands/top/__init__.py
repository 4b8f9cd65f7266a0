"""`sandbox top`: all tasks on one live screen."""
