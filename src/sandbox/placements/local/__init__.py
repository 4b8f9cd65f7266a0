"""Runs attempts on the machine of this process, which is a server or a worker."""
