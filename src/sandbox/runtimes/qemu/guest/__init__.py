"""The guest agent, which runs in the guest as root and as its first process.

The guest has the host's Python and of the package only this directory, so modules here import only each other, built-in
modules and C modules.
"""
