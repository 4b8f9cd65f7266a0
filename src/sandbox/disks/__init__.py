"""Disks of attempts. A disk is a size-limited directory with the workspace, the home directory and /tmp."""
