"""`sandbox top`: all tasks on one screen, live."""
