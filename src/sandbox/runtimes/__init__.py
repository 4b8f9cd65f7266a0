"""Runtimes: implementations that create, recover and destroy sandboxes."""
