"""Floor 3: the one door of a sandbox. Decisions without I/O, sockets in one file."""
