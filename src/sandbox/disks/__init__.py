"""Disks of attempts: a size-limited directory with workspace, home and /tmp."""
