"""Floor 3: the one door of a sandbox. Decisions without I/O; sockets in `serve` and the files that it names."""
