"""The gateway: a sandbox's only network access. Only the modules that the docstring of `server` lists use sockets."""
