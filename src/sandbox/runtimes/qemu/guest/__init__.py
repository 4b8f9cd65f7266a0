"""The guest agent, which runs as root in the guest and is its first process.

The guest has the host's Python, but only this directory of the package. Therefore, modules here import only each other,
built-in modules and C modules.
"""
