"""Disks for attempts. A disk is a size-limited directory that contains the workspace, the home directory and /tmp."""
