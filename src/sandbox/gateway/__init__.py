"""Network gateway: a sandbox's only path out. Only `server` and the modules that it names use sockets."""
