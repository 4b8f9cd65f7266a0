"""Network gateway: a sandbox's only path out. Only the modules that the docstring of `server` lists use sockets."""
