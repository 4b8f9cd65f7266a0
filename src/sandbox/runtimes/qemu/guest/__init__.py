"""The guest agent, which runs in the guest as root and as its first process.

The guest has the host's Python, but only this directory of the package. Therefore, modules here import only each other,
built-in modules and C modules.
"""
