"""The gateway: a sandbox's only network access. Only the modules listed in the docstring of `server` use sockets."""
