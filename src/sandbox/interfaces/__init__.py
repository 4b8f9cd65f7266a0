"""Interfaces between server, runner and their components: Protocols and small records."""
